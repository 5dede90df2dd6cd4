"""What is damaged, what then reads it, and when what came of it is right.

A target makes its inputs once, in `whole`; a case is a copy of them with one fault, beside which
all else is as it was. `read` gives what a program makes of them, in values that can be compared
with those of whole inputs. `judge` compares them: "same", or "other" where something else came of
it and nobody said so.

What has no checksum and may say one thing as well as another is not told from what it said before:
an edited text of a conversation ("changed"), a value of a run's metrics (judge_metrics).
"""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing import inputs
from fuzzing.captured import command, read, survives

Result = Any


@dataclass(frozen=True)
class Target:
    """Attributes:
    make: writes `whole`, and what else it likes, into a folder.
    read: (inputs, folder for outputs, the folder of `make`) -> what came of it.
    judge: (result, result of whole inputs, inputs, whole inputs) -> outcome.
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path, Path], Result]
    judge: Callable[[Result, Result, Path, Path], str]


def equal(result: Result, whole: Result, damaged: Path, original: Path) -> str:
    return "same" if result == whole else "other"


def touched(damaged: Path, original: Path) -> list[str]:
    """Which of some inputs are not those of `original`, by name; all of them where they are it."""
    names = sorted(path.name for path in original.iterdir())
    if damaged == original:
        return names
    return [name for name in names if contents(damaged / name) != contents(original / name)]


def digest(*parts: bytes) -> str:
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """Name -> digest of every file below a folder."""
    paths = [folder, *folder.rglob("*")]
    files = sorted(path for path in paths if path.is_file() or path.is_symlink())
    return {path.relative_to(folder).as_posix(): _kept_in(path) for path in files}


def _kept_in(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else digest(path.read_bytes())


def without_checksum(card: Path) -> bool:
    """Make a card one of an earlier version, which has no checksum; False where it is no JSON."""
    try:
        values = json.loads(card.read_text(encoding="utf-8"))
        del values["checksum"]
        card.write_text(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return True


# ---- conversations: JSONL in each format
def make_conversations(root: Path) -> None:
    inputs.save_tokenizer(root / "tokenizer")
    (root / "whole").mkdir()
    for name, rows in inputs.rows_of_every_format().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (root / "whole" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_conversations(folder: Path, out: Path, root: Path) -> Result:
    """File -> the sample_ids that it becomes, and how many of its lines are refused by name."""
    from megatron_tsft.commands.prepare import main

    found = {}
    for name in touched(folder, root / "whole"):
        target, kind = out / name, name.removesuffix(".jsonl")
        argv = ["--input", str(folder / name), "--tokenizer", str(root / "tokenizer"), "--output"]
        argv += [str(target), "--date", inputs.DATE, "--max-refused", "0.5", "--no-progress"]
        command(functools.partial(main, [*argv, "--format", kind]), target)
        found[name] = read(functools.partial(_conversations, target))
    return found


def _conversations(folder: Path) -> Result:
    from megatron_tsft.data.prepared import PreparedData

    data = PreparedData.load(folder)
    return [[data.row(i).sample_id for i in range(len(data))], sum(data.card.refused.values())]


def judge_conversations(result: Result, whole: Result, damaged: Path, original: Path) -> str:
    """ "refused": what cannot be used is named by its line. "changed": the lines that were touched
    became other conversations, as text that was edited does. In both, the other lines are what they
    were, and each that was touched is counted, as a conversation or as refused."""
    outcome = "same"
    for name, (ids, refused) in result.items():
        if not (damaged / name).is_file():
            return "changed"  # a link to a folder is an input of its own
        before, after = (_lines(folder / name) for folder in (original, damaged))
        first = _alike(before, after)
        last = min(_alike(before[::-1], after[::-1]), len(before) - first, len(after) - first)
        were, own = whole[name][0], len(ids) - first - last
        others = were[:first] + were[len(were) - last :]
        if ids[:first] + ids[len(ids) - last :] != others or own + refused != (
            len(after) - first - last
        ):
            return "other"
        if refused or ids != were:
            outcome = "refused" if refused else "changed"
    return outcome


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line.strip()]


def _alike(one: list[bytes], other: list[bytes]) -> int:
    """How many first lines are the same."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


# ---- prepared folders
def make_prepared(root: Path) -> None:
    inputs.save_tokenizer(root / "tokenizer")
    formats = inputs.rows_of_every_format()
    inputs.prepare_folder(formats["messages"], root / "tokenizer", root / "whole" / "weighted")
    inputs.prepare_folder(formats["sharegpt"], root / "tokenizer", root / "whole" / "plain")


def read_prepared(folder: Path, out: Path, root: Path) -> Result:
    found = {}
    for name in touched(folder, root / "whole"):
        rows = functools.partial(_rows, folder / name)
        try:
            found[name] = read(rows)
        finally:
            if without_checksum(folder / name / "tsft_data.json"):
                survives(functools.partial(read, rows))
    return found


def _rows(folder: Path) -> Result:
    from megatron_tsft.data.prepared import PreparedData

    data = PreparedData.load(folder)
    rows = [data.row(i) for i in range(len(data))]
    arrays = [(row.input_ids, row.loss_mask, row.token_weights) for row in rows]
    said = [digest(*(np.asarray(part).tobytes() for part in parts)) for parts in arrays]
    more = [data.lengths.tolist(), data.supervised().tolist(), data.used_tokens().tolist()]
    return [asdict(data.card), [row.sample_id for row in rows], said, more]


# ---- teacher caches
def make_caches(root: Path) -> None:
    inputs.save_tokenizer(root / "tokenizer")
    rows = inputs.rows_of_every_format()["sharegpt"]
    inputs.prepare_folder(rows, root / "tokenizer", root / "data")
    inputs.save_cache(root / "whole" / "cache", root / "data")


def read_caches(folder: Path, out: Path, root: Path) -> Result:
    from megatron_tsft.commands.inspect_cache import main

    cache, data = folder / "cache", root / "data"
    argv = [str(cache), "--data", str(data), "--json", str(out / "facts.json"), "--no-progress"]
    inspect = functools.partial(command, functools.partial(main, argv))
    try:
        inspect()
        facts = json.loads((out / "facts.json").read_text())
        facts["coverage"][0].pop("data")
        return [facts, read(functools.partial(_records, cache))]
    finally:
        if without_checksum(cache / "tsft_teacher.json"):
            survives(inspect)


def _records(folder: Path) -> Result:
    from megatron_tsft.teacher.reader import TeacherCache

    cache = TeacherCache.load(folder)
    records = [cache.record(i) for i in range(len(cache.keys))]
    parts = [(r.ids, r.logprobs, r.label_logp, r.tail_logmass) for r in records]
    said = [digest(*(np.ascontiguousarray(part).tobytes() for part in four)) for four in parts]
    return [asdict(cache.card), [key.as_py().hex() for key in cache.keys], said]


# ---- Hugging Face folders
def make_hf(root: Path) -> None:
    from megatron_tsft.checkpoint.convert import import_hf

    inputs.save_model(root / "whole" / "hf")
    import_hf(root / "whole" / "hf", root / "megatron", progress=False)


def read_hf(folder: Path, out: Path, root: Path) -> Result:
    """An import refuses, or makes a folder of which `verify` says that it is the model of the whole
    one, or in which tensor, value or token it differs."""
    from megatron_tsft.checkpoint.card import ModelCard
    from megatron_tsft.commands.convert import main
    from megatron_tsft.teacher.folder import read_hf_folder

    survives(lambda: read(lambda: read_hf_folder(folder / "hf")))
    argv = ["--hf", str(folder / "hf"), "--no-progress", "--megatron"]
    target = out / "megatron"
    command(functools.partial(main, ["import", *argv, str(target)]), target)
    said = command(
        functools.partial(main, ["verify", "--weights-only", *argv, str(root / "megatron")])
    )
    return [
        said.strip().splitlines()[-1],
        asdict(read(functools.partial(ModelCard.load, out / "megatron"))),
    ]


# ---- Megatron folders: an import and a run's, their trackers, lists, pickles and data
def make_megatron(root: Path) -> None:
    from megatron_tsft.checkpoint.convert import import_hf

    inputs.save_model(root / "hf")
    import_hf(root / "hf", root / "whole" / "import", progress=False)
    inputs.save_run(root / "whole" / "run", root / "whole" / "import")


def read_megatron(folder: Path, out: Path, root: Path) -> Result:
    """What an export of each writes, and the arguments that a run was saved with."""
    from megatron_tsft.checkpoint.folder import latest_checkpoint, mend_tracker
    from megatron_tsft.checkpoint.saved_arguments import saved_arguments
    from megatron_tsft.commands.convert import main

    found = {}
    for name in touched(folder, root / "whole"):
        argv = ["export", "--megatron", str(folder / name), "--no-progress", "--hf"]
        # what checksums keep from a reader comes to it from folders that have none
        bare = functools.partial(main, [*argv, str(out / f"bare-{name}"), "--verify-files", "none"])
        survives(lambda bare=bare, name=name: command(bare, out / f"bare-{name}"))
        survives(lambda name=name: read(lambda: mend_tracker(folder / name, write=False)))
        arguments = read(lambda name=name: saved_arguments(latest_checkpoint(folder / name)))
        command(functools.partial(main, [*argv, str(out / name)]), out / name)
        found[name] = [contents(out / name), sorted(map(repr, arguments.items()))]
    return found


def each_equal(result: Result, whole: Result, damaged: Path, original: Path) -> str:
    return "same" if all(whole[name] == found for name, found in result.items()) else "other"


# ---- cards
def make_cards(root: Path) -> None:
    make_megatron(root / "made")
    make_caches(root / "made")
    (root / "whole").mkdir()
    for path in (
        root / "made" / "data" / "tsft_data.json",
        root / "made" / "whole" / "cache" / "tsft_teacher.json",
        root / "made" / "whole" / "run" / "tsft_model.json",
        root / "made" / "whole" / "run" / "tsft_served.json",
    ):
        shutil.copy(path, root / "whole" / path.name)


def read_cards(folder: Path, out: Path, root: Path) -> Result:
    from megatron_tsft.checkpoint.card import ModelCard
    from megatron_tsft.checkpoint.served import Served
    from megatron_tsft.data.prepared import DataCard
    from megatron_tsft.teacher.format import CacheCard

    cards = []
    for kind in (ModelCard, DataCard, CacheCard, Served):
        if (card := read(functools.partial(kind.load, folder))) is not None:
            cards.append(asdict(card))
    return cards


def judge_cards(result: Result, whole: Result, damaged: Path, original: Path) -> str:
    # an import's folder has no card of how a model is served
    if not (damaged / "tsft_served.json").exists():
        return "same" if result == whole[:-1] else "other"
    return equal(result, whole, damaged, original)


# ---- metrics files
RESUMED = 9  # the step at which a run goes on


def make_metrics(root: Path) -> None:
    (root / "whole").mkdir()
    inputs.save_metrics(root / "whole" / "metrics.jsonl")


def read_metrics(folder: Path, out: Path, root: Path) -> Result:
    """The lines that a file has, and those that a run keeps which goes on at step 9."""
    from megatron_tsft.model.metrics_file import MetricsFile

    path = folder / "metrics.jsonl"
    before = path.read_bytes() if path.is_file() else b""
    read(lambda: MetricsFile(path).write({"step": RESUMED}))
    lines = path.read_bytes().decode("latin1").splitlines()
    assert lines[-1] == f'{{"step": {RESUMED}}}', lines
    return [before.decode("latin1").split("\n"), lines[:-1]]


def judge_metrics(result: Result, whole: Result, damaged: Path, original: Path) -> str:
    """What a run logs has no checksum. The lines that were not touched are kept or dropped as ever,
    and one that was touched is kept as it stands, unless it says a step that is run again or is the
    half line of a process that was killed."""
    (lines, kept), (before, kept_before) = result, whole
    same = all((line in kept) == (line in kept_before) for line in lines if line in before)
    own = [line for line in lines if line not in before and line not in kept]
    lost = [line for line in own if not _run_again(line) and line != lines[-1] and line.strip()]
    return "same" if same and not lost and kept == [x for x in lines if x in kept] else "other"


def _run_again(line: str) -> bool:
    try:
        return json.loads(line)["step"] >= RESUMED
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


TARGETS = {
    "conversations": Target(make_conversations, read_conversations, judge_conversations),
    "prepared": Target(make_prepared, read_prepared, each_equal),
    "caches": Target(make_caches, read_caches, equal),
    "hf": Target(make_hf, read_hf, equal),
    "megatron": Target(make_megatron, read_megatron, each_equal),
    "cards": Target(make_cards, read_cards, judge_cards),
    "metrics": Target(make_metrics, read_metrics, judge_metrics),
}
