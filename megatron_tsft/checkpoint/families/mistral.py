"""Mistral 7B from v0.2 on, Mistral Nemo, Mistral Small and what else says MistralForCausalLM without a window."""

from megatron_tsft.checkpoint import rows
from megatron_tsft.checkpoint.architecture import decoder_arguments
from megatron_tsft.checkpoint.mapping import Family

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    models="Mistral 7B from v0.2 on, Nemo, Small; not with a sliding window",
    arguments=decoder_arguments,
    rows=rows.decoder(rows.SELF_ATTENTION, rows.DENSE_MLP),
    extra_states=rows.DENSE_STATES,
)
