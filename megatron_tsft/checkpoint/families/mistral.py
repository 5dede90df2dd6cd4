"""Mistral 7B v0.2, v0.3, Nemo and any other MistralForCausalLM without a sliding window."""

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments
from megatron_tsft.checkpoint.mapping import Family

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    models="Mistral 7B v0.2 and v0.3, Nemo and what else has no sliding window",
    arguments=decoder_arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.DENSE_MLP),
    extra_states=rows.DENSE_STATES,
)
