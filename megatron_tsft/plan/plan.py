"""The plan of a run: all that is known before Megatron starts, checked in one list, frozen."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tsft.checkpoint.card import HF_FOLDER, ModelCard
from megatron_tsft.checkpoint.served import Served
from megatron_tsft.data.packed_dataset import PackedDataset
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.errors import UserError
from megatron_tsft.plan import defaults, same_run
from megatron_tsft.plan.command_line import CommandLine
from megatron_tsft.plan.config import TsftConfig
from megatron_tsft.plan.flags import Flags
from megatron_tsft.plan.layout import Batch, check_layout
from megatron_tsft.plan.meeting import Meeting
from megatron_tsft.plan.pack_length import check_pack, document_multiple
from megatron_tsft.plan.packs import DataSet, PackRules, Packs
from megatron_tsft.plan.precision import check_precision
from megatron_tsft.plan.refused import check_numbers, check_refused_flags
from megatron_tsft.plan.run_objectives import (
    RunObjectives,
    Trial,
    check_objectives,
    load_plugins,
    parse_objectives,
)
from megatron_tsft.plan.same_packs import SAVED, check_same_packs, facts_of_packs
from megatron_tsft.plan.sources import parse_sources
from megatron_tsft.plan.start_weights import StartWeights, find_whole_weights
from megatron_tsft.plan.teachers.choose import choose_kind
from megatron_tsft.plan.teachers.definition import Request, Teacher


@dataclass(frozen=True)
class Startup:
    """What Megatron is started with.

    Attributes:
        argv: the words of the command line.
        defaults: what its parser assumes where they say nothing, by destination.
        settings: what is set when its parser and its validation are through, by destination.
        quiet: nothing of it is written to a file.
    """

    argv: tuple[str, ...]
    defaults: Mapping[str, Any]
    settings: Mapping[str, Any]
    quiet: bool = False


@dataclass(frozen=True)
class Plan:
    """One run, decided and checked.

    Attributes:
        line: the command line.
        device: "cuda" or "cpu".
        flags: Megatron's values.
        card: of the model that is trained.
        batch: packs of a step.
        packs: the data.
        objectives: each data set's, and the evaluation's.
        teacher: the second distribution.
        start: where the weights come from.
        defaults: for Megatron's parser.
    """

    line: CommandLine
    device: str
    flags: Flags
    card: ModelCard
    batch: Batch
    packs: Packs
    objectives: RunObjectives
    teacher: Teacher
    start: StartWeights
    defaults: Mapping[str, Any]

    @property
    def config(self) -> TsftConfig:
        """Our own flags."""
        return self.line.config

    @property
    def eval_iters(self) -> int:
        """Steps of an evaluation: one exact pass, or none."""
        return self.packs.eval_iters if self.teacher.evaluates else 0

    @cached_property
    def startup(self) -> Startup:
        """What Megatron is started with."""
        settings: dict[str, Any] = {"eval_iters": self.eval_iters}
        # checkpoints keep them: a run that resumes is held to them
        settings[SAVED] = facts_of_packs(self.packs)
        settings[same_run.SAVED] = self.facts
        if self.start.resuming:
            settings |= {"load": self.flags.save, "finetune": False}
        if self.start.resuming and "load" in self.flags.named:  # these were for where it started
            settings |= {"no_load_optim": False, "no_load_rng": False, "ckpt_step": None}
        if self.start.instead is not None:
            settings["ckpt_step"] = self.start.instead
        argv = self.line.argv
        if self.config.check:
            argv = (*argv, "--tensorboard-dir", "")  # it would make that folder
        return Startup(argv, self.defaults, settings, quiet=self.config.check)

    @cached_property
    def facts(self) -> dict[str, str]:
        """What the run aims at, for its checkpoints."""
        data = [packs.data for packs in self.packs.members]
        return same_run.facts_of_run(self.objectives, self.teacher, data)

    @cached_property
    def served(self) -> Served:
        """How the trained model is to be served."""
        return Served.by(packs.data.card for packs in self.packs.members)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.flags.train_iters or (self.flags.train_samples or 0) // self.batch.size

    @property
    def finished(self) -> bool:
        """Whether the checkpoint has made all steps already."""
        return self.start.resumed is not None and self.start.step >= self.steps

    def lines(self) -> list[str]:
        """The plan for a person, a few lines."""
        weights = f"{self.config.model}, imported"
        if self.start.checkpoint is not None:
            anew = ", as a new run" if self.start.anew else ""
            weights = f"{self.start.folder}, {self.start.step} steps{anew}"
        if self.finished:
            weights += ", which are all of this run: a larger --train-iters goes on"
        saves = "nowhere"
        if self.flags.save:
            saves = f"{self.flags.save}, every {self.flags.save_interval} steps and at the end"
        lines = [
            *self.start.notes,
            f"weights: {weights}; saves: {saves}",
            f"model: {self.config.model}; teacher: {self.teacher.text}",
        ]
        shares, whole = self.packs.shares, sum(self.packs.shares)
        for i, objective in enumerate(self.objectives.members):
            head = ", in one with the LM head" if self.config.fuse_head else ""
            lines.append(f"objective: {objective!r}, source: {objective.row.source}{head}")
            lines.append(self._data_line(self.packs.members[i], shares[i] / whole))
        if (held := self.packs.evaluation) is not None:
            every = self.flags.eval_interval or defaults.NEVER
            when = f"every {every} steps and at the end" if every <= self.steps else "at the end"
            lines.append(
                f"evaluation: {self.config.eval_data}, {len(held.data)} conversations in"
                f" {held.packs} packs, one exact pass {when}, by {self.objectives.evaluation!r}"
            )
        if unknown := self.served.unknown_stops(Path(self.config.model) / HF_FOLDER):
            stops = ", ".join(f"{token} ({number})" for token, number in unknown.items())
            lines.append(
                f"turns end with {stops}, where {self.config.model} would not stop: an export adds"
                " it to generation_config.json"
            )
        if not self.flags.save:
            lines.append("no --save: nothing will be kept, metrics.jsonl neither")
        return lines

    def _data_line(self, packs: PackedDataset, share: float) -> str:
        """One data set: what it holds, and how often the run reads it."""
        length, multiple = self.packs.rules.seq_length, self.packs.rules.document_multiple
        full = 100 * int(packs.pieces.positions.sum()) / (packs.packs * length)
        padded = f"padded to multiples of {multiple}, " if multiple > 1 else ""
        cut = f"{packs.pieces.long} truncated"
        if packs.mute:
            cut += f" ({packs.mute} of them before the first token to learn)"
        if packs.pieces.split:
            parts = len(packs.pieces.rows) - len(packs.data) + packs.pieces.long
            cut = f"{packs.pieces.long} split into {parts}"
        mixed = f"{100 * share:.3g}% of the packs; " if share < 1 else ""
        return (
            f"train: {packs.data.directory}, {len(packs.data)} conversations in {packs.packs} packs"
            f" of {length} ({full:.0f}% full), {padded}{cut}; {mixed}"
            f"{epochs_text(self.steps, packs.packs_per_epoch, self.batch.size * share)}"
        )


def epochs_text(steps: int, packs_per_epoch: int, packs_per_step: float) -> str:
    """How long a run is, in words, for a data set that has so many packs of every step."""
    per_epoch = packs_per_epoch / packs_per_step
    epochs = steps / per_epoch
    part = "" if epochs >= 1 else f" ({math.ceil(epochs * 100)}% of the data)"
    return f"{per_epoch:.4g} steps an epoch, {steps} steps are {epochs:.2f} epochs{part}"


def make_plan(line: CommandLine, device: str, meeting: Meeting | None = None) -> Plan:
    """Check everything that can be checked without Megatron, and decide.

    Nothing is written.

    Args:
        line: the command line.
        device: "cuda" or "cpu".
        meeting: where the ranks of this job agree; None where the others are not there.

    Raises:
        UserError: something is missing, or does not fit.
    """
    config = line.config
    check_refused_flags(line)
    check_numbers(line)
    _check_required(line)
    load_plugins(config.plugin)
    sources = parse_sources(config.data)
    objectives = parse_objectives(
        config,
        sources,
        named=bool({"tsft_objective", "tsft_args"} & line.given.keys()),
        evaluates=bool(config.eval_data),
    )

    card = ModelCard.load(config.model)
    defaults.check_card(line, card, config.model)
    assumed = defaults.parser_defaults(card, config.model, device, line.given)
    flags = Flags.of(line.given, assumed)
    kind = choose_kind(config, flags, objectives)
    batch = check_layout(flags, card, line.ranks.size)
    engine = defaults.engine_installed()
    check_precision(flags, device, engine=engine)
    check_pack(flags, config.document_multiple)

    train = [PreparedData.load(source.directory) for source in sources]
    held = PreparedData.load(config.eval_data) if config.eval_data else None
    used = train if held is None else [*train, held]
    for data in used:
        _check_data(data, card)
    check_objectives(objectives, Trial(kind.name != "none", kind.top_k), train, held)
    local = device == "cpu" or not engine or flags.transformer_impl == "local"
    start = find_whole_weights(config, card, flags, line.ranks, meeting, engine=not local)
    teacher = kind.find(Request(config, flags, line.ranks, card, start, used))

    rules = PackRules(
        flags.pack_length,
        flags.seed,
        document_multiple(flags, config.document_multiple),
        long_samples=config.long_samples,
    )
    members = [
        DataSet(data, source.share, objective.reads_teacher)
        for data, source, objective in zip(train, sources, objectives.members, strict=True)
    ]
    evaluation = None if held is None else DataSet(held, 1.0, objectives.evaluation.reads_teacher)
    packs = Packs(members, evaluation, rules, batch, teacher.records)
    for part in packs.members:
        if part.mute == len(part.data):
            raise UserError(
                f"--seq-length {flags.pack_length} cuts each of the {part.mute} conversations of"
                f" {part.data.directory} before its first token to learn: raise it"
            )
    if start.resumed is not None:
        check_same_packs(start.resumed, packs, batch.size, flags.context_parallel_size)
    plan = Plan(line, device, flags, card, batch, packs, objectives, teacher, start, assumed)
    if start.resumed is not None:
        same_run.check_same_run(start.resumed, plan.facts, flags)
    return plan


def _check_required(line: CommandLine) -> None:
    """Raise UserError for a flag that every run needs and that is missing, and for a layout of no
    ranks."""
    given = line.given
    needed = {
        "--tsft-model": line.config.model,
        "--tsft-data": line.config.data,
        "--seq-length": given.get("seq_length"),
        "--train-iters (or --train-samples)": given.get("train_iters")
        or given.get("train_samples"),
        "--micro-batch-size": given.get("micro_batch_size"),
        "--lr": given.get("lr"),
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: --help has an example of a whole command")
    for name, value in given.items():
        if name.endswith("_parallel_size") and isinstance(value, int) and value < 1:
            raise UserError(f"{line.option(name)} {value}: pass at least 1, or leave it out")


def _check_data(data: PreparedData, card: ModelCard) -> None:
    """Raise UserError where prepared data was made for another tokenizer or vocabulary than the
    model's."""
    theirs, ours = data.card.tokenizer_fingerprint, card.tokenizer_fingerprint
    if ours is not None and theirs != ours:
        raise UserError(
            f"{data.directory} was prepared with another tokenizer (fingerprint {theirs}) than the"
            f" model's ({ours}): run tools/prepare_data.py with the tokenizer of the model's"
            " Hugging Face folder"
        )
    if data.card.vocab_size > card.vocab_size:
        raise UserError(
            f"{data.directory} holds token id {data.card.vocab_size - 1}, the model's vocabulary"
            f" ends at {card.vocab_size - 1}: prepare the data with the model's own tokenizer"
        )
