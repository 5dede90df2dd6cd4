"""What a model of any size said once, in the folders that `cache_teacher.py` wrote."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megatron_tsft import console
from megatron_tsft.data.prepared import PreparedData
from megatron_tsft.data.teacher_rows import TeacherSource
from megatron_tsft.errors import UserError
from megatron_tsft.plan.teachers.definition import Kind, Request, Teacher
from megatron_tsft.teacher.format import CacheIdentity
from megatron_tsft.teacher.reader import CachedTeacher, TeacherCache


@dataclass(frozen=True)
class Caches:
    """The records of one cache or several; `packs.RecordBook`."""

    caches: Sequence[TeacherCache]

    @property
    def top_k(self) -> int:
        return max(cache.top_k for cache in self.caches)

    def of(self, data: PreparedData) -> TeacherSource:
        return CachedTeacher(self.caches, data)


def _find(request: Request) -> Teacher:
    config = request.config
    caches = [TeacherCache.load(directory) for directory in config.teacher_cache]
    for cache in (
        caches if config.verify == "full" else []
    ):  # sizes were compared when it was opened
        _verify(cache, request)
    text = f"cached in {', '.join(config.teacher_cache)}, tail {config.teacher_tail}"
    tail = "drop" if config.teacher_tail == "drop" else "uniform"
    asked = {_asked(cache.card.identity) for cache in caches}
    identity = f"cache {', '.join(sorted(asked))}, tail {config.teacher_tail}"
    return Teacher("cache", text, identity, records=Caches(caches), tail=tail)


def _asked(identity: CacheIdentity) -> str:
    """Who was asked, and how; about which conversations makes no other teacher."""
    parts = [identity.teacher_hash, f"top-{identity.top_k}", f"temperature {identity.temperature}"]
    return " ".join([*parts, identity.dtype, identity.token_map or ""]).strip()


def _verify(cache: TeacherCache, request: Request) -> None:
    """Read every byte; the ranks of a node share it.

    Raises:
        UserError: the cache is damaged, or has ids outside the model's vocabulary.
    """
    rank, size = request.ranks.local_rank, request.ranks.local_size
    total = sum(facts["bytes"] for facts in cache.card.shards.values()) // size
    title = f"checking {cache.directory}"
    bar = tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        file=console.stream(),
        disable=rank > 0,
    )
    with bar:
        try:
            vocab_size = min(cache.card.identity.vocab_size, request.student.vocab_size)
            cache.verify(bar.update, share=(rank, size), vocab_size=vocab_size)
        except UserError as error:
            error.met_here_alone = True
            raise


KIND = Kind(
    "cache",
    "what a model said once, in --tsft-teacher-cache",
    _find,
    fields=("teacher_cache", "teacher_tail"),
    needed="teacher_cache",
    top_k=True,
)
