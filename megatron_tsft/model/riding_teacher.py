"""A frozen teacher that rides along with the student's own pipeline pass, at any PP and VPP.

Each stage computes its share of both models and sends cat(student, teacher) hidden states on; the
last stage has the teacher's exact full-vocabulary logits. (A separate forward pass inside
forward_step deadlocks or takes the wrong tensor under 1F1B.) The teacher is held outside the module
tree: DDP, the optimizer and checkpoints never see it.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from megatron_tsft.loss import TeacherHidden
from megatron_tsft.model.teacher_vocabulary import TeacherVocabulary, load_mapped_rows


@dataclass(frozen=True)
class RidingTeacher:
    """Which teacher rides along.

    Attributes:
        config: its own architecture, with the student's padded vocabulary (`teacher_config`).
        checkpoint: the folder with its torch_dist files (release/ or iter_*), always the original
            one.
        vocabulary: how its tokens and the student's correspond.
        vocab_size: the student's true vocabulary.
    """

    config: GPTModelConfig
    checkpoint: Path
    vocabulary: TeacherVocabulary
    vocab_size: int


def teacher_logits(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    scale_logits: Any,
    **unused: Any,
) -> Tensor:
    """The teacher's output hook: plain vocabulary-sharded logits [s, b, V/tp]."""
    return scale_logits(output_layer(hidden_states, weight=output_weight)[0])


def teacher_hidden(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    scale_logits: Any,
    **unused: Any,
) -> TeacherHidden:
    """The teacher's output hook for a fused head: what its logits are made of."""
    weight = output_layer.weight if output_weight is None else output_weight
    return TeacherHidden(
        scale_logits(hidden_states), weight
    )  # a factor, so it may come before the product


class GuidedGPTModel(GPTModel):
    """A student that carries its frozen teacher; the same calls as GPTModel."""

    @property
    def teacher(self) -> GPTModel:
        return self.__dict__["_teacher"]

    def attach(self, teacher: GPTModel, absent: Tensor | None) -> None:
        """Hold `teacher` without registering it as a submodule; `absent` [V/tp]: columns that it
        has no token for."""
        self.__dict__["_teacher"], self.__dict__["_absent"], self.__dict__["_taken"] = (
            teacher,
            absent,
            None,
        )

    def take_reference(self, step: int) -> None:
        """Make the teacher what the student is now; once a step, at its first micro-batch."""
        if self.__dict__["_taken"] == step:
            return
        self.__dict__["_taken"] = step
        ours, theirs = self.state_dict(), self.teacher.state_dict()
        with torch.no_grad():
            for name, value in theirs.items():
                if isinstance(value, Tensor):
                    value.copy_(ours[name])

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
        """As GPTModel.forward; on the last stage the context first gets its `teacher`."""
        shared = {
            k: v for k, v in kwargs.items() if k not in ("labels", "loss_mask", "output_processor")
        }
        fused = output_processor_context is not None and output_processor_context.fuse_head
        with torch.no_grad():
            hook = teacher_hidden if fused else teacher_logits
            teacher_out: Any = self.teacher(*args, output_processor=hook, **shared)
        if self.post_process:
            assert output_processor_context is not None
            absent = self.__dict__["_absent"]
            if absent is not None and fused:
                teacher_out = replace(teacher_out, absent=absent)
            elif absent is not None:
                teacher_out.masked_fill_(absent, -torch.inf)
            output_processor_context.teacher = teacher_out
            return super().forward(
                *args, output_processor_context=output_processor_context, **kwargs
            )
        hidden = super().forward(*args, **kwargs)
        return torch.cat([hidden, teacher_out.to(hidden.dtype)], -1)


class GuidedModelBuilder(GPTModelBuilder):
    """Builds student and teacher of each stage together."""

    def build_model(
        self,
        pg_collection: Any,
        pre_process: Any = None,
        post_process: Any = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One stage; the student's random initialisation is what it would be without a teacher."""
        student = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        student.__class__ = GuidedGPTModel
        config = self._model_config
        assert isinstance(student, GuidedGPTModel) and isinstance(config, GuidedModelConfig)
        riding = config.riding
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        random_state, tracker_states = torch.get_rng_state(), tracker.get_states()
        teacher = GPTModelBuilder(frozen_config(riding.config)).build_model(
            pg_collection, student.pre_process, student.post_process, vp_stage
        )
        torch.set_rng_state(random_state)
        tracker.set_states(tracker_states)
        teacher = teacher.requires_grad_(False).eval()
        absent = None
        if student.post_process:
            width = config.vocab_size // pg_collection.tp.size()
            absent = riding.vocabulary.absent(
                pg_collection.tp.rank() * width, width, riding.vocab_size
            )
        if torch.cuda.is_available():
            device = torch.cuda.current_device()
            teacher, absent = teacher.cuda(device), None if absent is None else absent.cuda(device)
        student.attach(teacher.to(student.config.params_dtype), absent)
        return student


class GuidedModelConfig(GPTModelConfig):
    """GPTModelConfig whose builder adds the teacher."""

    builder: ClassVar[str] = f"{__name__}.GuidedModelBuilder"

    @property
    def riding(self) -> RidingTeacher:
        return self.__dict__["_riding"]

    def add_teacher(self, riding: RidingTeacher) -> None:
        """Set which teacher rides along; it is loaded when the model is built, also on resuming."""
        object.__setattr__(self, "_riding", riding)  # GPTModelConfig proxies plain assignment
        self.post_wrap_hooks.append(lambda model: load_teachers(model, riding))


def frozen_config(of: GPTModelConfig) -> GPTModelConfig:
    """An architecture as a teacher: nothing random, nothing recomputed or offloaded, no FP8."""
    config = copy.copy(of)
    transformer = copy.deepcopy(of.transformer)
    transformer.perform_initialization = False
    transformer.fp8 = transformer.fp4 = None
    transformer.fp8_param = transformer.fp4_param = False
    transformer.recompute_granularity = None
    transformer.cpu_offloading = transformer.fine_grained_activation_offloading = False
    transformer.cuda_graph_impl = "none"
    object.__setattr__(
        config, "transformer", transformer
    )  # GPTModelConfig proxies plain assignment
    return config


def load_teachers(model: list[Any], riding: RidingTeacher) -> list[Any]:
    """Load all virtual stages' teachers of this rank in one collective load; a
    `ModelConfig.post_wrap_hooks` member."""
    load_frozen(
        [chunk.teacher for chunk in unwrap_model(model)], riding.checkpoint, riding.vocabulary
    )
    return model


def load_frozen(chunks: list[Any], checkpoint: Path, vocabulary: TeacherVocabulary) -> None:
    """Load a frozen model's stages from its checkpoint, at whatever padded vocabulary they were
    built.

    Embedding and head may have other shapes than in the checkpoint
    (megatron/core/tensor_parallel/layers.py:396): what both have is read; columns that only the
    student has are masked, by `TeacherVocabulary.absent`.
    """
    state = {
        f"model{i}": chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})
        for i, chunk in enumerate(chunks)
    }
    loaded: Any = dist_checkpointing.load(state, str(checkpoint))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(
            loaded[f"model{i}"], strict=False
        )  # _extra_state entries are empty here
        if vocabulary.token_map is not None:
            load_mapped_rows(chunk, checkpoint, vocabulary, chunk.pg_collection.tp.rank())
