"""What somebody may have meant by a name that is none."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'target-sft'?)" for a name that is close to one of `names`, else ""."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
