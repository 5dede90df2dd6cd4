"""The families: each module here holds one `FAMILY`; a new family is a new file, no other edit."""

import importlib
import pkgutil
from typing import Any

from megatron_tsft.checkpoint.architecture import value_of
from megatron_tsft.checkpoint.mapping import Family, check_table
from megatron_tsft.checkpoint.refused import REFUSED
from megatron_tsft.errors import UserError


def families() -> dict[str, Family]:
    """Name -> family, of every module in this folder."""
    by_name: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        check_table(family)
        by_name[family.name] = family
    return by_name


def get_family(name: str) -> Family:
    """The family of that name.

    Raises:
        UserError: there is none; lists the names that exist.
    """
    known = families()
    if name not in known:
        raise UserError(f"unknown model family {name!r}: choose one of {', '.join(sorted(known))}")
    return known[name]


def family_of(config: Any) -> Family:
    """The family that serves a Hugging Face config.

    Raises:
        UserError: no family serves its architecture; says why, where known, and lists those that
            are served.
    """
    known = families().values()
    architectures = value_of(config, "architectures", list[str] | None) or []
    for family in known:
        if architectures and architectures[0] in family.architectures:
            # the model that transformers would build
            own = type(config).__name__.removesuffix("Config") + "ForCausalLM"
            if own not in family.architectures:
                raise UserError(
                    f"transformers reads config.json as {type(config).__name__}, which does not go"
                    f" with architectures={architectures}: correct one of them"
                )
            return family
    reason = REFUSED.get(architectures[0] if architectures else "")
    if reason:
        raise UserError(f"{architectures[0]} is not supported: {reason}")
    served = ", ".join(sorted(name for family in known for name in family.architectures))
    raise UserError(
        f"config.json says architectures={architectures}: this converter serves {served}"
    )
