"""A program for the tests: one rank loads an imported folder at some TP and PP and saves it as a
training run does.

    save_sharded.py RANK STORE SOURCE TARGET TP PP
The embedding is padded for 128 x TP, weights are fp32, and Adam's first moment lies beside them as
optimizer state.
"""

import copy
import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tsft.checkpoint.card import ModelCard
from megatron_tsft.checkpoint.folder import TRACKER, latest_checkpoint
from megatron_tsft.checkpoint.megatron_model import Layout, build_model, load_weights


def main(rank: int, store: str, source: Path, target: Path, tp: int, pp: int) -> None:
    # all that building, loading and saving ask of CUDA
    torch.cuda.synchronize = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self  # pyright: ignore[reportAttributeAccessIssue]
    file_store = dist.FileStore(store, tp * pp)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=tp * pp)
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
    )

    parallel_state.initialize_model_parallel(tp, pp)
    card = ModelCard.load(source)
    card = dataclasses.replace(
        card, make_vocab_size_divisible_by=192
    )  # 1152 at TP 2: not the import's 1024
    model = build_model(card, Layout(tp, pp))
    load_weights(model, latest_checkpoint(source))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    metadata = content | {"dp_cp_group": group}
    state = model.sharded_state_dict(metadata=metadata)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = get_param_id_to_sharded_param_map(copy.copy(state), parameters)
    optimizer = {
        index: make_sharded_optimizer_tensor(
            moments[index], torch.full_like(parameter, 7.0), "optimizer.state.exp_avg"
        )
        for index, parameter in enumerate(parameters)
        if index in moments
    }
    folder = target / "iter_0000020"
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    everything = {
        "args": Namespace(num_layers=3),
        "iteration": 20,
        "model": state,
        "optimizer": optimizer,
    }
    dist_checkpointing.save(everything, str(folder), content_metadata=content)
    if rank == 0:
        (target / TRACKER).write_text("20")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        int(sys.argv[1]),
        sys.argv[2],
        Path(sys.argv[3]),
        Path(sys.argv[4]),
        int(sys.argv[5]),
        int(sys.argv[6]),
    )
