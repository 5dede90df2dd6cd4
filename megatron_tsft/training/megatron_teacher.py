"""A teacher from a Megatron checkpoint, computed in Megatron's own pipeline at any tensor and
pipeline parallelism."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import training
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_tsft import upstream
from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.mapping import padded_vocab_size
from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.packed_dataset import IGNORED
from megatron_tsft.data.packing import first_fit_decreasing
from megatron_tsft.data.prepared import Sample
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.errors import UserError
from megatron_tsft.loss.collectives import all_gather
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.model.packed_attention import packed_sequences
from megatron_tsft.model.riding_teacher import frozen_config, load_frozen
from megatron_tsft.model.teacher_vocabulary import TeacherVocabulary
from megatron_tsft.teacher.job import Progress, as_rows
from megatron_tsft.teacher.topk import teacher_topk
from megatron_tsft.training import arguments, checks
from megatron_tsft.training.config import TsftConfig
from megatron_tsft.training.precision import check_precision

ALIGNMENT = 128  # positions of a pack: sequence parallel splits them, and kernels like them round
VIRTUAL = {
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
}
HEAD_TOKENS = 1024  # whose logits are held at once


@dataclass
class Asked:
    """What one micro-batch's output hook needs, and where its answer goes
    (`output_processor_context=`)."""

    teacher: "MegatronTeacher"
    batch: MicroBatch
    records: list[TeacherRecords[Tensor]] = field(default_factory=list)


class MegatronTeacher:
    """A frozen GPTModel over all ranks of this job; see `teacher.job.Predictor`."""

    def __init__(
        self,
        folder: Path,
        card: ModelCard,
        checkpoint: Path,
        flags: Sequence[str],
        *,
        dtype: str,
        device: str,
        world_size: int,
        top_k: int,
        temperature: float,
        vocab_size: int,
        token_map: Sequence[int] | None,
        batch_tokens: int,
    ):
        """Start Megatron and load the model.

        Args:
            folder, card, checkpoint: the teacher's imported or trained folder, its card and its
                weights.
            flags: Megatron's own, such as --tensor-model-parallel-size 2.
            dtype: "fp32", "bf16" or "fp16".
            vocab_size: ids at or beyond it get no mass; the data's vocabulary with a token map.
            token_map: the teacher's id of each token of the data's vocabulary, -1 for none.
            batch_tokens: positions of a pack; a longer conversation makes them all longer.

        Raises:
            UserError: the layout does not fit the model, or Megatron refuses a flag.
        """
        upstream.apply_all()
        limit = card.megatron_arguments["max_position_embeddings"]
        argv = [
            *flags,
            "--micro-batch-size",
            "1",
            "--seq-length",
            str(min(batch_tokens, limit)),
            "--train-iters",
            "1",
        ]
        argv += [
            "--lr",
            "1e-6",
            "--no-load-optim",
            "--no-load-rng",
            *([] if dtype == "fp32" else [f"--{dtype}"]),
        ]
        given = arguments.given_flags(argv)
        arguments.refuse_flags(given)
        arguments.check_card(given, card, str(folder))
        checks.check_layout(given, card, world_size)
        sizes = (given.get(f"{kind}_parallel_size", 1) for kind in ("expert_model", "context"))
        if max(sizes) > 1 or VIRTUAL & given.keys():
            raise UserError(
                "a teacher is cached without expert and context parallelism and virtual pipeline"
                " stages: leave them out"
            )
        defaults = arguments.defaults_for(card, TsftConfig(model=str(folder)), device, given)
        check_precision(defaults | given, device, engine=arguments.engine_installed())
        defaults["distributed_timeout_minutes"] = (
            7 * 24 * 60
        )  # a rank that is done waits for the others' last shards
        vocabulary = TeacherVocabulary(card.vocab_size, token_map)
        ranks = given.get("tensor_model_parallel_size", 1)
        defaults["padded_vocab_size"] = padded_vocab_size(
            vocab_size if token_map is not None else card.vocab_size,
            card.make_vocab_size_divisible_by * ranks,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # the list of 800 arguments
            args = arguments.parse(argv, defaults)
            training.initialize_megatron()
        config = arguments.model_config(args)
        config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with contextlib.redirect_stdout(io.StringIO()):
            self.chunks: list[Any] = list(
                GPTModelBuilder(frozen_config(config)).build_distributed_models(
                    groups, wrap_with_ddp=False
                )
            )
        frozen: list[Any] = unwrap_model(self.chunks)  # pyright: ignore[reportAssignmentType]
        load_frozen(frozen, checkpoint, vocabulary)
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        width = args.padded_vocab_size // ranks
        self.absent = vocabulary.absent(
            mpu.get_tensor_model_parallel_rank() * width, width, vocab_size
        )
        if self.absent is not None:
            self.absent = self.absent.to(device)
        self.device, self.top_k, self.temperature, self.vocab_size = (
            device,
            top_k,
            temperature,
            vocab_size,
        )
        self.batch_tokens = batch_tokens
        self.share = (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())
        self.writes = mpu.is_pipeline_last_stage() and mpu.get_tensor_model_parallel_rank() == 0

    def predict(self, conversations: Sequence[Sample], progress: Progress) -> list[TeacherRows]:
        """The records of some conversations, in their order; [] on a rank that does not write."""
        packs = self._packs(conversations)
        asked: list[Asked] = []
        batches = iter([self._batch([conversations[i] for i in pack]) for pack in packs])
        counts = [
            sum(int(np.count_nonzero(conversations[i].loss_mask)) for i in pack) for pack in packs
        ]
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=partial(self._forward, asked, iter(counts), progress),
                data_iterator=batches,
                model=self.chunks,
                num_microbatches=len(packs),
                seq_length=self.batch_tokens,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not self.writes:
            return []
        records: dict[int, TeacherRows] = {}
        for pack, answer in zip(packs, asked, strict=True):
            own = [int(np.count_nonzero(conversations[i].loss_mask)) for i in pack]
            records |= dict(zip(pack, as_rows(answer.records[0], own), strict=True))
        return [records[i] for i in range(len(conversations))]

    def _packs(self, conversations: Sequence[Sample]) -> list[list[int]]:
        """Which conversations go through the model together."""
        lengths = np.array(
            [max(len(sample.input_ids) - 1, 1) for sample in conversations], np.int64
        )
        order = np.argsort(-lengths, kind="stable")
        bins = first_fit_decreasing(lengths[order], max(self.batch_tokens, int(lengths.max())))
        return [order[bins == number].tolist() for number in range(int(bins.max()) + 1)]

    def _batch(self, samples: Sequence[Sample]) -> MicroBatch:
        """Conversations end to end, the tail padded to a round number of positions."""
        total = sum(max(len(sample.input_ids) - 1, 1) for sample in samples)
        size = -(-total // ALIGNMENT) * ALIGNMENT
        tokens, labels, positions = (
            np.zeros(size, np.int64),
            np.full(size, IGNORED, np.int64),
            np.zeros(size, np.int64),
        )
        at = 0
        for sample in samples:
            n = len(sample.input_ids) - 1
            place = slice(at, at + n)
            tokens[place], positions[place] = sample.input_ids[:-1], np.arange(n)
            labels[place] = np.where(sample.loss_mask[1:], sample.input_ids[1:], IGNORED)
            at += max(n, 1)
        positions[at:] = np.arange(size - at)
        pack = {
            "tokens": tokens,
            "labels": labels,
            "position_ids": positions,
            "index": np.zeros(1, np.int64),
        }
        return MicroBatch.from_packs(
            {name: torch.from_numpy(value) for name, value in pack.items()}, self.device
        )

    def _forward(
        self,
        asked: list[Asked],
        counts: Iterator[int],
        progress: Progress,
        batches: Iterator[MicroBatch],
        model: Any,
    ) -> tuple[Tensor, Any]:
        """Megatron's forward step: one pack through this stage."""
        question = Asked(self, next(batches))
        asked.append(question)
        batch = question.batch
        output = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels,
            packed_seq_params=packed_sequences(batch.lengths, self.device),
            output_processor=record_output,
            output_processor_context=question,
        )
        progress.tokens(next(counts))
        return output, lambda output, non_loss_data: None


def record_output(
    *,
    hidden_states: Tensor,  # [s/tp if sequence parallel else s, 1, h]
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,  # [1, s]
    context: Asked,
    scale_logits: Any,
    **unused: Any,
) -> Tensor:
    """Records of the supervised positions go to `context`; their logits alone are computed."""
    teacher = context.teacher
    group: Any = mpu.get_tensor_model_parallel_group()
    hidden = (
        all_gather(hidden_states, group).flatten(0, 1)
        if output_layer.sequence_parallel
        else hidden_states
    )
    weight = output_layer.weight if output_weight is None else output_weight
    rows = torch.nonzero(labels[0] != IGNORED)[:, 0]
    parts = [
        teacher_topk(
            scale_logits(hidden[part, 0] @ weight.T),
            labels[0, part],
            teacher.top_k,
            vocab_size=teacher.vocab_size,
            temperature=teacher.temperature,
            absent=teacher.absent,
            tp_group=group if group.size() > 1 else None,
        )
        for part in rows.split(HEAD_TOKENS)
    ]
    context.records.append(TeacherRecords.join(parts, torch.cat))
    return hidden_states.new_zeros(1)
