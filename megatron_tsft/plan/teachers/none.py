"""No teacher."""

from megatron_tsft.plan.teachers.definition import Kind, Request, Teacher


def _find(request: Request) -> Teacher:
    return Teacher("none", "none", "none")


KIND = Kind("none", "no teacher", _find)
