"""Install the layer, once, before the first `import megatron`: for entry points and tests alone."""

import functools
import logging
import sys

import torch

from megatron_tsft.cpu import cuda_names, function_mode

_installed: list[bool] = []


def install() -> None:
    """Make torch.cuda inert and send cuda allocations to the CPU; then the two switches that
    Megatron's loop needs.

    Raises:
        RuntimeError: a GPU is there (the layer would hide it), or megatron was imported first.
    """
    if _installed:
        return
    if torch.cuda.is_available() and torch.cuda.device_count() > 0:
        # a dry run on a GPU machine is legitimate, but only where the process cannot see the GPU
        raise RuntimeError(
            "the CPU layer hides torch.cuda: set CUDA_VISIBLE_DEVICES= (empty) for --tsft-device"
            " cpu"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("install the CPU layer before importing megatron")
    cuda_names.install()
    torch._dynamo.config.disable = True  # type: ignore[attr-defined]  # Megatron's jit_fuser is torch.compile
    function_mode.install()
    _installed.append(True)

    import megatron.training.training as training

    # its warm-up draws TP-sized random tensors from the one
    # generator there is: TP1 and TP2 would then differ
    training.set_jit_fusion_options = cuda_names.nothing
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
