"""Auxiliary losses of experts beside a loss per supervised token: the step's gradient is dense
autograd's."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tsft.checkpoint.torch_dist_reader import CheckpointReader
from megatron_tsft.data.pack_writer import IGNORED
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.model.auxiliary_losses import AuxiliaryScale, has_auxiliary_losses
from megatron_tsft.plan.packs import PackRules
from tests.training.runs import Train, World, check_ran, make_moe

PACKS, MULTIPLE, BALANCE, Z = 8, 4, 1.0, 0.1
FLAGS = (
    f"--micro-batch-size 1 --global-batch-size {PACKS} --tsft-document-multiple {MULTIPLE}"
    f" --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {BALANCE} --moe-z-loss-coeff"
    f" {Z}"
).split()
SFT = ("--tsft-objective", "sft")
TP2, PP2, CP2, EP2 = (
    f"--{kind}-parallel-size 2"
    for kind in ("tensor-model", "pipeline-model", "context", "expert-model")
)
LAYOUTS = {
    "one": (1, ""),
    "micro-batches over ranks": (2, "--use-distributed-optimizer"),
    "ep2": (2, EP2),
    "tp2-sp-ep2": (2, f"{TP2} --sequence-parallel {EP2} --expert-tensor-parallel-size 1"),
    "pp2-vpp2": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "cp2": (2, CP2),
    "cp2-ep2": (2, f"{CP2} {EP2}"),
}


@pytest.fixture(scope="module")
def experts(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Qwen3-MoE of its own, on the session's data."""
    from megatron_tsft.checkpoint.convert import import_hf

    own = World(tmp_path_factory.mktemp("balanced"))
    import_hf(make_moe(own.hf), own.base, progress=False)
    own.train.symlink_to(world.train)
    return own


def dense_norm(world: World, weight_of_one: float | None) -> float:
    """Gradient norm of mean cross-entropy + the auxiliary losses, each layer's and each pack's, in
    float64.

    weight_of_one: of one pack's auxiliary losses; None is 1 / packs.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(world.hf), dtype=torch.float64, experts_implementation="eager"
    ).eval()
    routed: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            said = routed.setdefault(name, [])
            module.register_forward_hook(
                lambda gate, inputs, _, said=said: said.append(
                    inputs[0].flatten(0, -2) @ gate.weight.T
                )
            )
    packs = PackedDataset(
        PreparedData.load(world.train),
        seq_length=64,
        global_batch_size=PACKS,
        seed=1234,
        document_multiple=MULTIPLE,
    )
    cross_entropy, count, auxiliary = torch.zeros(()), 0, torch.zeros(())
    for index in range(PACKS):
        item = packs[index]
        starts = torch.nonzero(item["position_ids"] == 0)[:, 0].tolist()
        for said in routed.values():
            said.clear()
        for start, end in zip(starts, [*starts[1:], 64], strict=True):
            logits = model(input_ids=item["tokens"][None, start:end]).logits[0]
            labels = item["labels"][start:end]
            cross_entropy = cross_entropy + torch.nn.functional.cross_entropy(
                logits, labels, ignore_index=IGNORED, reduction="sum"
            )
            count += int((labels != IGNORED).sum())
        for said in routed.values():
            logits = torch.cat(said)  # [64, experts]
            assert len(logits) == 64
            chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0).mean(0) / 2
            # arXiv 2101.03961 and 2202.08906
            auxiliary = auxiliary + BALANCE * 4 * (chosen * logits.softmax(-1).mean(0)).sum()
            auxiliary = auxiliary + Z * logits.logsumexp(-1).square().mean()
    weight = 1 / PACKS if weight_of_one is None else weight_of_one * 64 / count
    (cross_entropy / count + weight * auxiliary).backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())


@pytest.mark.slow
def test_the_gradient_is_that_of_dense_autograd(train: Train, experts: World) -> None:
    expected = dense_norm(experts, None)
    assert abs(dense_norm(experts, 1.0) / expected - 1) > 0.05  # what Megatron alone makes of them
    assert abs(dense_norm(experts, 0.0) / expected - 1) > 0.05
    start = ("--tsft-model", str(experts.base), *SFT, *FLAGS)
    for name, (ranks, flags) in LAYOUTS.items():
        run = check_ran(train(name, *start, *flags.split(), ranks=ranks, steps=1))
        assert run.rows[0]["grad_norm"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.slow
def test_a_teacher_with_experts_stays_as_it_was(train: Train, experts: World) -> None:
    """The reference rides along with the student's auxiliary losses on: trained two steps, it still
    says the same.

    From step 0 again with the trained student, a reference that had moved would change the loss.
    """
    guided = (
        "--tsft-model",
        str(experts.base),
        *FLAGS,
        "--tsft-teacher",
        "reference",
        "--tsft-args",
        "eta=0.5",
    )
    first = check_ran(train("first", *guided, "--save-interval", "2", ranks=1, steps=4, keep=True))
    again = check_ran(
        train("again", *guided, "--load", str(first.save), "--ckpt-step", "2", steps=4, keep=True)
    )
    for ours, theirs in zip(again.rows, first.rows[2:], strict=True):
        assert {k: v for k, v in ours.items() if k != "tokens_per_second"} == {
            k: v for k, v in theirs.items() if k != "tokens_per_second"
        }
    keys = CheckpointReader(first.save / "iter_0000002").metadata.state_dict_metadata
    assert not [key for key in keys if "expert_bias" in key or "teacher" in key]


@pytest.mark.parametrize(
    ("arguments", "has"),
    [
        ({}, False),
        ({"kinds": "aux_loss"}, True),
        ({"kinds": ["seq_aux_loss", "global_aux_loss"]}, True),
        ({"kinds": ["none"]}, False),
        ({"kinds": "sinkhorn"}, False),
        ({"z": 1e-3}, True),
        ({"kinds": "aux_loss", "z": 1e-3, "experts": None}, False),
    ],
)
def test_which_runs_have_auxiliary_losses(arguments: dict[str, Any], has: bool) -> None:
    given = {"kinds": "none", "z": None, "experts": 4} | arguments
    args = Namespace(
        moe_router_load_balancing_type=given["kinds"],
        moe_z_loss_coeff=given["z"],
        num_moe_experts=given["experts"],
    )
    assert has_auxiliary_losses(args) == has


def test_the_scale_of_a_step() -> None:
    """Supervised over all positions, times fp16's scale, which on a GPU meets only a tensor without
    dimensions."""

    class Packs:
        asked: list[tuple[int, int]] = []
        rules = PackRules(seq_length=64, seed=1, document_multiple=1, long_samples="refuse")

        def supervised_tokens(self, start: int, stop: int) -> int:
            self.asked.append((start, stop))
            return 48

    def fp16(loss: Tensor) -> Tensor:
        assert loss.dim() == 0
        return loss * torch.tensor([1024.0])

    packs: Any = Packs()
    config = Namespace(grad_scale_func=None)
    scale = AuxiliaryScale(config, packs, batch=8, consumed=lambda: 16)
    assert scale() == scale() == 48 / (8 * 64)
    config.grad_scale_func = fp16
    assert scale().item() == 1024 * 48 / (8 * 64) and scale().numel() == 1
    assert packs.asked == [(16, 24)]  # once a step
