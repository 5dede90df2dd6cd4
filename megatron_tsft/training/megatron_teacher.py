"""A teacher from a Megatron checkpoint, computed in Megatron's own pipeline at any tensor and
pipeline parallelism."""

import argparse
import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
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

from megatron_tsft.data.batch import MicroBatch
from megatron_tsft.data.pack_writer import IGNORED, write_pack
from megatron_tsft.data.packing import first_fit_decreasing
from megatron_tsft.data.prepared import Sample
from megatron_tsft.data.teacher_rows import TeacherRows
from megatron_tsft.loss.collectives import all_gather
from megatron_tsft.loss.records import TeacherRecords
from megatron_tsft.model.riding_teacher import frozen_config, load_frozen
from megatron_tsft.model.target_step import run_packed
from megatron_tsft.model.teacher_vocabulary import TeacherVocabulary
from megatron_tsft.plan.asking import asking_argv, plan_asking
from megatron_tsft.teacher.folder import MegatronFolder
from megatron_tsft.teacher.job import Progress, Share, as_rows
from megatron_tsft.teacher.request import Question
from megatron_tsft.teacher.topk import teacher_topk
from megatron_tsft.training.read_flags import read_flags
from megatron_tsft.training.start import model_config, start

ALIGNMENT = 128  # positions of a pack: sequence parallel splits them, and kernels like them round
HEAD_TOKENS = 1024  # whose logits are held at once


@dataclass
class RecordContext:
    """What one micro-batch's output hook needs, and where its answer goes
    (`output_processor_context=`)."""

    teacher: "MegatronTeacher"
    batch: MicroBatch
    records: list[TeacherRecords[Tensor]] = field(default_factory=list)


class MegatronTeacher:
    """A frozen GPTModel over all ranks of this job; see `teacher.job.Predictor`."""

    def __init__(
        self,
        folder: MegatronFolder,
        question: Question,
        flags: Sequence[str],
        *,
        dtype: str,
        device: str,
    ):
        """Start Megatron and load the model.

        Args:
            folder: the teacher's.
            question: what it is asked; a conversation that is longer than its batch_tokens makes
                packs longer.
            flags: Megatron's own, such as --tensor-model-parallel-size 2.
            dtype: "fp32", "bf16" or "fp16".
            device: "cuda" or "cpu".

        Raises:
            UserError: the layout does not fit the model, or Megatron refuses a flag.
        """
        self.device, self.question = device, question
        card = folder.card
        line = read_flags(asking_argv(flags, card, dtype, question.batch_tokens))
        columns = card.vocab_size if question.token_map is None else question.vocab_size
        args = start(plan_asking(line, str(folder.path), card, device, columns))
        vocabulary = TeacherVocabulary(card.vocab_size, question.token_map)
        self.chunks = _frozen_chunks(args, folder, vocabulary)
        ranks = args.tensor_model_parallel_size
        width = args.padded_vocab_size // ranks
        first = mpu.get_tensor_model_parallel_rank() * width
        self.absent = vocabulary.absent(first, width, question.vocab_size)
        if self.absent is not None:
            self.absent = self.absent.to(device)
        self.share = Share(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size())
        first_tp_rank = mpu.get_tensor_model_parallel_rank() == 0
        self.writes = mpu.is_pipeline_last_stage() and first_tp_rank

    def predict(self, conversations: Sequence[Sample], progress: Progress) -> list[TeacherRows]:
        """The records of some conversations, in their order; [] on a rank that does not write."""
        packs = self._packs(conversations)
        contexts: list[RecordContext] = []
        batches = iter([self._batch([conversations[i] for i in pack]) for pack in packs])
        counts = [
            sum(int(np.count_nonzero(conversations[i].loss_mask)) for i in pack) for pack in packs
        ]
        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=partial(self._forward, contexts, iter(counts), progress),
                data_iterator=batches,
                model=self.chunks,
                num_microbatches=len(packs),
                seq_length=self.question.batch_tokens,
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if not self.writes:
            return []
        records: dict[int, TeacherRows] = {}
        for pack, context in zip(packs, contexts, strict=True):
            own = [int(np.count_nonzero(conversations[i].loss_mask)) for i in pack]
            records |= dict(zip(pack, as_rows(context.records[0], own), strict=True))
        return [records[i] for i in range(len(conversations))]

    def _packs(self, conversations: Sequence[Sample]) -> list[list[int]]:
        """Which conversations go through the model together."""
        lengths = np.array(
            [max(len(sample.input_ids) - 1, 1) for sample in conversations], np.int64
        )
        order = np.argsort(-lengths, kind="stable")
        bins = first_fit_decreasing(
            lengths[order], max(self.question.batch_tokens, int(lengths.max()))
        )
        return [order[bins == number].tolist() for number in range(int(bins.max()) + 1)]

    def _batch(self, samples: Sequence[Sample]) -> MicroBatch:
        """Conversations end to end, the tail padded to a round number of positions."""
        total = sum(max(len(sample.input_ids) - 1, 1) for sample in samples)
        pack = write_pack(samples, -(-total // ALIGNMENT) * ALIGNMENT)
        tensors = {name: torch.from_numpy(values) for name, values in pack.items()}
        return MicroBatch.from_packs(
            tensors | {"index": torch.zeros(1, dtype=torch.int64)}, self.device
        )

    def _forward(
        self,
        contexts: list[RecordContext],
        counts: Iterator[int],
        progress: Progress,
        batches: Iterator[MicroBatch],
        model: Any,
    ) -> tuple[Tensor, Any]:
        """Megatron's forward step: one pack through this stage."""
        context = RecordContext(self, next(batches))
        contexts.append(context)
        output = run_packed(model, context.batch, record_output, context, self.device)
        progress.tokens(next(counts))
        return output, lambda output, non_loss_data: None


def _frozen_chunks(
    args: argparse.Namespace, folder: MegatronFolder, vocabulary: TeacherVocabulary
) -> list[Any]:
    """This rank's stages of the model, loaded."""
    with contextlib.redirect_stdout(io.StringIO()):  # Megatron's own lines
        training.initialize_megatron()
    config = model_config(args)
    config.transformer.variable_seq_lengths = args.pipeline_model_parallel_size > 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with contextlib.redirect_stdout(io.StringIO()):
        builder = GPTModelBuilder(frozen_config(config))
        chunks: list[Any] = list(builder.build_distributed_models(groups, wrap_with_ddp=False))
    frozen: list[Any] = unwrap_model(chunks)  # pyright: ignore[reportAssignmentType]
    load_frozen(frozen, folder.checkpoint, vocabulary)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    return chunks


def record_output(
    *,
    hidden_states: Tensor,  # [s/tp if sequence parallel else s, 1, h]
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,  # [1, s]
    context: RecordContext,
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
            teacher.question.top_k,
            vocab_size=teacher.question.vocab_size,
            temperature=teacher.question.temperature,
            absent=teacher.absent,
            tp_group=group if group.size() > 1 else None,
        )
        for part in rows.split(HEAD_TOKENS)
    ]
    context.records.append(TeacherRecords.join(parts, torch.cat))
    return hidden_states.new_zeros(1)
