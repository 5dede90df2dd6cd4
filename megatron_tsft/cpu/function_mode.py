"""Every torch call that names a cuda device lands on the CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def is_cuda(device: object) -> bool:
    """Whether a device argument means a GPU: "cuda...", torch.device("cuda", i), an index."""
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _backward(
    tensor: torch.Tensor,
    gradient: Any = None,
    retain_graph: Any = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """`Tensor.backward` without its detour through modes, which would come back here."""
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


class CudaToCpu(TorchFunctionMode):
    """Rewrites device arguments; `.cuda()` and `.pin_memory()` return the tensor itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            # a mode is off while it answers: back on, for
            # what backward functions allocate (see `install`)
            with self:
                return _backward(*args, **kwargs)
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers pick parameters by the string 'torch.cuda.FloatTensor'
            # (core/optimizer/optimizer.py)
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.distributed.all_to_all_single:
            # Megatron's expert dispatcher makes numbers of the sizes only where it copies them from
            # a GPU (core/transformer/moe/moe_utils.py, maybe_move_tensor_to_cpu)
            for name in ("output_split_sizes", "input_split_sizes"):
                if isinstance(kwargs.get(name), torch.Tensor):
                    kwargs[name] = kwargs[name].tolist()
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def install() -> None:
    """Switch the mode on for the rest of the process, also below `torch.autograd.backward`.

    torch 2.14 hands that function to the mode, which is off while it answers; the backward
    functions of Megatron's tensor parallel layers allocate on "cuda" there. Its question whether
    there is a mode is answered with no.
    """
    torch.autograd.has_torch_function = lambda tensors: False  # pyright: ignore[reportPrivateImportUsage]
    CudaToCpu().__enter__()
