"""Megatron's flags that we read, typed, with Megatron's own defaults: a test compares them with the
parser's."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flags:
    """The values of a run: the command line's, else ours (defaults.py), else Megatron's.

    A field is named as Megatron's argparse destination; `named` holds the destinations that were
    set by the command line.
    """

    # how the model and the data are divided
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None  # as the tensor parallel size
    sequence_parallel: bool = False
    num_layers_per_virtual_pipeline_stage: int | None = None
    num_virtual_stages_per_pipeline_rank: int | None = None
    pipeline_model_parallel_layout: str | None = None
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    # batches and steps
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    eval_global_batch_size: int | None = None
    seq_length: int | None = None
    train_iters: int | None = None
    train_samples: int | None = None
    lr: float | None = None
    seed: int = 1234
    # files
    save: str | None = None
    load: str | None = None
    ckpt_step: int | None = None
    ckpt_format: str = "torch_dist"
    save_interval: int | None = None
    eval_interval: int | None = None
    async_save: bool = False
    finetune: bool = False
    no_load_optim: bool | None = None
    optimizer: str = "adam"
    use_distributed_optimizer: bool = False
    dataloader_type: str | None = None
    # how it is computed
    bf16: bool = False
    fp16: bool = False
    transformer_impl: str = "transformer_engine"
    moe_token_dispatcher_type: str = "allgather"
    overlap_param_gather: bool = False
    fp8: str | None = None
    fp8_recipe: str = "delayed"
    fp8_param_gather: bool = False
    fp8_output_proj: bool = False
    fp4: str | None = None
    fp4_recipe: str = "nvfp4"
    named: frozenset[str] = frozenset()

    @staticmethod
    def of(given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> "Flags":
        """From a command line's values and what is assumed where it says nothing, by
        destination."""
        values = {**(defaults or {}), **given}
        known = {field.name for field in dataclasses.fields(Flags)} - {"named"}
        return Flags(**{k: v for k, v in values.items() if k in known}, named=frozenset(given))

    @property
    def virtual_stages(self) -> bool:
        """Whether a rank holds several parts of the pipeline."""
        return any(
            (
                self.num_layers_per_virtual_pipeline_stage,
                self.num_virtual_stages_per_pipeline_rank,
                self.pipeline_model_parallel_layout,
            )
        )

    @property
    def pack_length(self) -> int:
        """--seq-length, which every plan has checked to be there."""
        assert self.seq_length is not None
        return self.seq_length
