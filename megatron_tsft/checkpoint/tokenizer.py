"""What makes two tokenizers the same: a fingerprint that data, cards and caches share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_tsft.errors import UserError
from megatron_tsft.plain_json import read_object
from megatron_tsft.trust import trusted
from megatron_tsft.typed import shown

LARGEST_ID = 1 << 24
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a folder holds one of the files that every tokenizer has."""
    return any((Path(directory) / name).is_file() for name in FILES)


def load_tokenizer(directory: str | Path) -> Any:
    """The Hugging Face tokenizer of a local folder; never a hub, and none of the folder's own
    Python, unless folders are trusted.

    Raises:
        UserError: the folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not Path(directory).is_dir():
        raise UserError(
            f"tokenizer folder {directory} does not exist: pass a local Hugging Face folder"
        )
    _check_ids(Path(directory) / "tokenizer.json")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trusted()
        )
        longest = tokenizer.model_max_length  # which transformers compares with every length
        if not isinstance(longest, int | float):
            raise ValueError(f"model_max_length={shown(longest)}: it must be a number")
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise own_code(error, f"the tokenizer of {directory}") or UserError(
            f"no tokenizer could be loaded from {directory}: {' '.join(str(error).split())}"
        ) from error


def _check_ids(path: Path) -> None:
    """Look at the ids in a tokenizer.json, as the tokenizers library does not: it makes a table as
    long as the largest one, and ends the process where there is no memory for it. Of two tokens
    with one id it takes now this one, now that.

    Raises:
        UserError: an id without measure, or one twice.
    """
    if not path.is_file():
        return
    remedy = "download or copy the tokenizer again"
    values = read_object(path, remedy)
    model, added = values.get("model"), values.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    own = vocabulary if isinstance(vocabulary, dict) else {}
    added = [token for token in added if isinstance(token, dict)] if type(added) is list else []
    more = [(token.get("content"), token.get("id")) for token in added]
    for token, number in [*own.items(), *more]:
        if isinstance(number, int) and number > LARGEST_ID:
            raise UserError(
                f"{path} is damaged (the token {shown(token)} has the id {number}, more than any"
                f" vocabulary): {remedy}"
            )
    tokens: dict[Any, str] = {}
    for token, number in own.items():
        if isinstance(number, int) and tokens.setdefault(number, token) != token:
            raise UserError(
                f"{path} is damaged (the tokens {shown(tokens[number])} and {shown(token)} have one"
                f" id, {number}): {remedy}"
            )


def own_code(error: Exception, what: str) -> UserError | None:
    """What to say where transformers would have run a folder's own Python, and was not let."""
    if "trust_remote_code" not in str(error):
        return None
    return UserError(
        f"{what} needs Python of its own, which was not run: if you trust whoever wrote the folder,"
        " pass --trust (runs: --tsft-trust)"
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits over what decides ids: every (token, id), the merges where known, the special
    ids.

    The chat template is left out on purpose: it decides text, not ids, and users edit it.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    merges: Any = None
    if getattr(tokenizer, "is_fast", False):
        merges = json.loads(tokenizer.backend_tokenizer.to_str()).get("model", {}).get("merges")
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = json.dumps([vocabulary, merges, special], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
