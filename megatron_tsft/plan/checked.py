"""The folders that a run loads, compared with their checksums before it starts; the ranks share
it, and agree on what they found."""

from pathlib import Path

from tqdm import tqdm

from megatron_tsft import console
from megatron_tsft.checkpoint.manifest import check_folder, read_lists
from megatron_tsft.errors import UserError
from megatron_tsft.plan.agreement import told_to_all
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
        UserError: a file is missing or damaged, by name; on all ranks.
    """
    problem, unlisted = None, []
    try:
        total = sum(entry.size for entry in read_lists(checkpoint).values())
        bar = tqdm(
            total=total // ranks.size,
            desc=f"checking {checkpoint}",
            unit="B",
            unit_scale=True,
            file=console.stream(),
            disable=ranks.rank > 0 or how != "full" or not total,
        )
        with bar:
            share = (ranks.rank, ranks.size)
            unlisted = check_folder(
                Path(directory), checkpoint, how, share=share, progress=bar.update
            )
    except UserError as error:
        problem = str(error)
    problem = told_to_all(ranks, problem)
    if problem is not None:
        raise UserError(problem)
    return unlisted
