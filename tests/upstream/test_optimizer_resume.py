"""The distributed optimizer with torch's Adam: three reasons not to resume, and an exact resume
with the repair."""

import tempfile
from typing import Any

import torch

from megatron_tsft.upstream import optimizer_resume
from tests.fresh import fresh
from tests.ranks import run_ranks
from tests.upstream.source import check_lines
from tests.upstream.tiny_gpt import backward, tiny_gpt

STEPS = 3  # before the checkpoint, and again after it


def run() -> dict[str, Any]:
    """In one process: what each defect does, then training through a checkpoint and without it."""
    from megatron_tsft import cpu

    cpu.install()
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(1, one_rank, folder)[0]


def one_rank(_: int, folder: str) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    trained = Training()
    losses = trained.steps(0)
    trained.save(folder)
    result: dict[str, Any] = {
        "applies": [optimizer_resume.applies()],
        "losses": losses + trained.steps(STEPS),
    }

    result["line 839"] = failure(lambda: Training().load(folder))
    prepared = Training()
    prepared.optimizer._init_optimizer_states_with_dummy_values()
    result["line 1223"] = failure(lambda: prepared.load(folder))
    reloaded = Training()
    reloaded.steps(0)
    reloaded.optimizer.load_state_dict(reloaded.optimizer.state_dict())
    shared = len({id(step) for step in reloaded.step_tensors()})
    reloaded.steps(STEPS, 1)
    result["line 1032"] = [shared, len(reloaded.step_tensors()), *reloaded.step_counts()]

    optimizer_resume.apply()
    result["applies"].append(optimizer_resume.applies())
    resumed = Training()
    resumed.load(folder)
    result["resumed"] = resumed.steps(STEPS)
    result["step counts"] = [trained.step_counts(), resumed.step_counts()]
    return result


class Training:
    """A model and its distributed optimizer; every object starts from the same weights."""

    def __init__(self) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.model = tiny_gpt(distributed_optimizer=True, persist_layer_norm=False)
        config = OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=0.0, weight_decay=0.1, use_distributed_optimizer=True
        )
        chained: Any = get_megatron_optimizer(config, [self.model])
        (self.optimizer,) = chained.chained_optimizers

    def steps(self, first: int, count: int = STEPS) -> list[float]:
        """Train on batches `first`, `first` + 1, ...; their losses."""
        losses = []
        for seed in range(first, first + count):
            losses.append(backward(self.model, seed))
            self.optimizer.step()
        return losses

    def state(self, is_loading: bool) -> dict[str, Any]:
        from megatron.core import parallel_state

        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        metadata = {"dp_cp_group": group, "distrib_optim_sharding_type": "fully_reshardable"}
        model = self.model.module.sharded_state_dict(metadata=metadata)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata),
        }

    def save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self.state(is_loading=False), folder)

    def load(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        loaded: Any = dist_checkpointing.load(self.state(is_loading=True), folder)
        self.model.module.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def step_tensors(self) -> list[torch.Tensor]:
        return [state["step"] for state in self.optimizer.optimizer.state.values()]

    def step_counts(self) -> list[float]:
        return sorted({step.item() for step in self.step_tensors()})


def failure(action: Any) -> list[str]:
    """The exception's type and text, and the line of distrib_optimizer.py where it was raised."""
    try:
        action()
    except (AssertionError, KeyError) as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        assert trace is not None and trace.tb_frame.f_code.co_filename.endswith(
            "distrib_optimizer.py"
        )
        return [type(error).__name__, str(error), str(trace.tb_lineno)]
    return ["nothing was raised"]


def test_three_reasons_not_to_resume_and_an_exact_resume_with_the_repair() -> None:
    result = fresh(run)
    assert result["applies"] == [True, False]
    assert result["line 839"] == ["AssertionError", "", "839"]  # no state, so no step
    assert result["line 1223"] == ["KeyError", "'step'", "1223"]
    tensors, parameters, *counts = result["line 1032"]
    assert tensors == 1 < parameters
    assert counts == [
        STEPS + parameters
    ]  # one more step advanced the one tensor once for every parameter
    assert len(set(result["losses"])) == 2 * STEPS
    assert result["resumed"] == result["losses"][STEPS:]  # to the last bit
    assert result["step counts"] == [[2 * STEPS], [2 * STEPS]]


def test_the_docstring_names_the_right_lines() -> None:
    file = "core/optimizer/distrib_optimizer.py"
    lines = {
        (file, 839): "assert len(steps) == 1",
        (file, 1223): "if not isinstance(tensors[key], torch.Tensor):",
        (file, 1028): "step = torch.tensor(steps[0], dtype=torch.float)",
        (file, 1032): 's["step"] = step',
    }
    check_lines(optimizer_resume, lines)
