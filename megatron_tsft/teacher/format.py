"""The teacher cache on disk: a card, and shards of one record per conversation, keyed by its
sample_id.

    tsft_teacher.json        the card; written last, so a folder without one is not finished
    plan.json                what is being computed; a folder that has it can be continued
    shard-00000.arrow ...    Arrow IPC files, memory-mapped by readers

A row of a shard is a conversation; its `tokens` are the supervised ones in their order:

    sample_id               binary[16]      prepared.sample_id, its 32 hex digits as bytes
    tokens                  list<struct>    [n], of each:
        ids                 int32[k]        token ids, the most likely first
        logprobs            halffloat[k]    log T at the ids
        label_logprob       halffloat       log T(y)
        tail_logmass        float           log of the mass outside the k, as its own sum

6 bytes an entry, 6 a token and 20 a conversation. Conversations that are equal share one record,
whichever data set they come from.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import pyarrow as pa

from megatron_tsft.cards import load_card, save_card
from megatron_tsft.errors import UserError
from megatron_tsft.typed import Count, Positive

CARD_FILE = "tsft_teacher.json"
PLAN_FILE = "plan.json"
FORMAT_VERSION = 1
# of an id and its log-prob; of a label and a tail; of a sample_id and an offset
ENTRY_BYTES, TOKEN_BYTES, CONVERSATION_BYTES = 6, 6, 20
# at least so many where the data is large enough: what ranks share and a killed job keeps
SHARDS = 256
SMALLEST_SHARD, LARGEST_SHARD = 256 << 10, 64 << 20


@dataclass(frozen=True)
class CacheIdentity:
    """What makes two caches the same: who was asked what about which conversations.

    Attributes:
        teacher: its folder's name, for people.
        teacher_hash: 16 hex digits over its weights.
        tokenizer_fingerprint: of the data.
        vocab_size: ids lie below it.
        top_k, temperature: records are the top k of softmax(z / temperature).
        dtype: the teacher's.
        data: fingerprint of each prepared data set, in order.
        token_map: hash of a token map, or None.
    """

    teacher: str
    teacher_hash: str
    tokenizer_fingerprint: str
    vocab_size: Count
    top_k: Count
    temperature: Positive
    dtype: str
    data: list[str]
    token_map: str | None = None


class ShardFacts(TypedDict):
    """What a shard must be."""

    bytes: int
    sha256: str
    conversations: int


@dataclass(frozen=True)
class CacheCard:
    """A finished cache: its identity, what it holds, and what each shard must be.

    shards: file name -> what it must be.
    """

    identity: CacheIdentity
    conversations: Count
    tokens: Count
    shards: dict[str, ShardFacts] = field(default_factory=dict)

    @staticmethod
    def load(directory: Path | str) -> "CacheCard":
        """The card of a cache folder.

        Raises:
            UserError: there is none, the cache is not finished, or it was written by another
                version.
        """
        directory = Path(directory)
        command = "tools/cache_teacher.py --teacher DIR --data DIR --output DIR --top-k K"
        if (directory / PLAN_FILE).is_file() and not (directory / CARD_FILE).is_file():
            raise UserError(
                f"{directory} is an unfinished teacher cache: run tools/cache_teacher.py as"
                " before, it resumes"
            )
        return load_card(
            CacheCard,
            directory / CARD_FILE,
            FORMAT_VERSION,
            what="teacher cache card",
            missing=f"{directory} has no {CARD_FILE}: make the cache with `{command}`",
            again=f"make the cache again with `{command}`",
        )

    def save(self, directory: Path | str) -> None:
        """Write the card into a folder, atomically; last."""
        save_card(self, Path(directory) / CARD_FILE, FORMAT_VERSION)


def schema(top_k: int) -> pa.Schema:
    """Of a shard's one batch."""
    token = {
        "ids": pa.list_(pa.int32(), top_k),
        "logprobs": pa.list_(pa.float16(), top_k),
        "label_logprob": pa.float16(),
        "tail_logmass": pa.float32(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in token.items()]
    tokens = pa.list_(pa.field("token", pa.struct(fields), nullable=False))
    return pa.schema(
        [
            pa.field("sample_id", pa.binary(16), nullable=False),
            pa.field("tokens", tokens, nullable=False),
        ]
    )


def sample_keys(sample_ids: pa.ChunkedArray) -> pa.Array:
    """[n] binary[16] from the hex digits of a prepared data set's ids."""
    raw = bytes.fromhex("".join(sample_ids.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(sample_ids), [None, pa.py_buffer(raw)]
    )


def shard_name(number: int) -> str:
    """The file of shard `number`."""
    return f"shard-{number:05d}.arrow"


def expected_bytes(conversations: int, tokens: int, top_k: int) -> int:
    """Size of a cache on disk, headers aside."""
    return conversations * CONVERSATION_BYTES + tokens * (TOKEN_BYTES + top_k * ENTRY_BYTES)
