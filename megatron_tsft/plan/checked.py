"""The folders that a run loads, compared with their checksums before it starts; the ranks share
it."""

from pathlib import Path

from tqdm import tqdm

from megatron_tsft import console
from megatron_tsft.checkpoint.manifest import check_files, read_lists
from megatron_tsft.errors import UserError
from megatron_tsft.plan.command_line import Ranks


def check_weights(directory: Path | str, checkpoint: Path, how: str, ranks: Ranks) -> list[str]:
    """Compare a checkpoint, and what is around it, with their lists; returns the files that are not
    listed.

    Args:
        directory: the folder that was named.
        checkpoint: the one in it that will be loaded.
        how: --tsft-verify.
        ranks: each reads its share, so that every byte is read once a job.

    Raises:
        DamagedError: a file of the checkpoint, or of the folder around it, is missing or damaged,
            by name; on the rank that read it.
    """
    share = (ranks.rank, ranks.size)

    def checkpoint_files() -> list[str]:
        total = sum(entry.size for entry in read_lists(checkpoint).values())
        with tqdm(
            total=total // ranks.size,
            desc=f"checking {checkpoint}",
            unit="B",
            unit_scale=True,
            file=console.stream(),
            disable=ranks.rank > 0 or how != "full" or not total,
        ) as bar:
            return check_files(checkpoint, how, share=share, progress=bar.update)

    try:
        check_files(Path(directory), how, share=share)
        return checkpoint_files()
    except UserError as error:
        if ranks.size > 1:  # the others do not know of it, and none can choose another checkpoint
            error.met_here_alone = True
        raise
