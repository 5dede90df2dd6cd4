"""A frozen teacher that rides along with the student's own pipeline pass, at any PP and VPP.

Each stage computes its share of both models and sends cat(student, teacher) hidden states on; the last stage has the
teacher's exact full-vocabulary logits. (A separate forward pass inside forward_step deadlocks or takes the wrong
tensor under 1F1B.) The teacher is held outside the module tree: DDP, the optimizer and checkpoints never see it.
"""

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from megatron_tsft.loss import TeacherHidden


def teacher_logits(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any) -> Tensor:
    """The teacher's output hook: plain vocabulary-sharded logits [s, b, V/tp]."""
    return output_layer(hidden_states, weight=output_weight)[0]


def teacher_hidden(
    *, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any
) -> TeacherHidden:
    """The teacher's output hook for a fused head: what its logits are made of."""
    return TeacherHidden(hidden_states, output_layer.weight if output_weight is None else output_weight)


class GuidedGPTModel(GPTModel):
    """A student that carries its frozen teacher; the same calls as GPTModel."""

    @property
    def teacher(self) -> GPTModel:
        return self.__dict__["_teacher"]

    def attach(self, teacher: GPTModel) -> None:
        """Hold `teacher` without registering it as a submodule."""
        self.__dict__["_teacher"] = teacher

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Split what the previous stage sent: [s, b, student hidden + teacher hidden]."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        student: Any = None
        teacher: Any = None
        if received is not None:
            width = self.config.hidden_size
            student = received[..., :width].contiguous()
            teacher = received[..., width:].detach().contiguous()
        super().set_input_tensor(student)
        self.teacher.set_input_tensor(teacher)

    def forward(self, *args: Any, output_processor_context: Any = None, **kwargs: Any) -> Tensor:
        """As GPTModel.forward; on the last stage the context gets its `teacher` before the student's hook runs."""
        shared = {k: v for k, v in kwargs.items() if k not in ("labels", "loss_mask", "output_processor")}
        fused = output_processor_context is not None and output_processor_context.fuse_head
        with torch.no_grad():
            hook = teacher_hidden if fused else teacher_logits
            teacher_out: Any = self.teacher(*args, output_processor=hook, **shared)
        if self.post_process:
            assert output_processor_context is not None
            output_processor_context.teacher = teacher_out
            return super().forward(*args, output_processor_context=output_processor_context, **kwargs)
        hidden = super().forward(*args, **kwargs)
        return torch.cat([hidden, teacher_out.to(hidden.dtype)], -1)


class GuidedModelBuilder(GPTModelBuilder):
    """Builds student and teacher of each stage together."""

    def build_model(
        self, pg_collection: Any, pre_process: Any = None, post_process: Any = None, vp_stage: int | None = None
    ) -> GPTModel:
        """One stage; the student's random initialisation is what it would be without a teacher."""
        student = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        student.__class__ = GuidedGPTModel
        config = self._model_config
        assert isinstance(student, GuidedGPTModel) and isinstance(config, GPTModelConfig)
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        random_state = torch.get_rng_state(), tracker.get_states()
        teacher = GPTModelBuilder(frozen_config(config)).build_model(
            pg_collection, student.pre_process, student.post_process, vp_stage
        )
        torch.set_rng_state(random_state[0])
        tracker.set_states(random_state[1])
        teacher = teacher.requires_grad_(False).eval()
        if torch.cuda.is_available():
            teacher = teacher.cuda(torch.cuda.current_device())
        student.attach(teacher.to(student.config.params_dtype))
        return student


class GuidedModelConfig(GPTModelConfig):
    """GPTModelConfig whose builder adds the teacher."""

    builder: ClassVar[str] = f"{__name__}.GuidedModelBuilder"


def frozen_config(student: GPTModelConfig) -> GPTModelConfig:
    """The student's architecture as a teacher: nothing random, nothing recomputed or offloaded, no FP8."""
    config = copy.copy(student)
    transformer = copy.deepcopy(student.transformer)
    transformer.perform_initialization = False
    transformer.fp8 = None
    transformer.recompute_granularity = None
    transformer.cpu_offloading = transformer.fine_grained_activation_offloading = False
    transformer.cuda_graph_impl = "none"
    object.__setattr__(config, "transformer", transformer)  # GPTModelConfig proxies plain assignment
    return config


def load_teachers(model: list[Any], checkpoint: Path) -> list[Any]:
    """Load all virtual stages' teachers in one collective load; a `ModelConfig.post_wrap_hooks` member.

    Args:
        model: this rank's wrapped model chunks.
        checkpoint: the folder with the torch_dist files (release/ or iter_*), always the original one.
    """
    teachers = [chunk.teacher for chunk in unwrap_model(model)]
    state = {
        f"model{i}": teacher.sharded_state_dict(metadata={"dp_cp_group": teacher.pg_collection.dp_cp})
        for i, teacher in enumerate(teachers)
    }
    loaded: Any = dist_checkpointing.load(state, str(checkpoint))
    for i, teacher in enumerate(teachers):
        teacher.load_state_dict(loaded[f"model{i}"], strict=False)  # _extra_state entries are empty here
    return model
