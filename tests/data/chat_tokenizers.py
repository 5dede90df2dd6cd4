"""Real tokenizers, trained here on a little text, with chat templates of the kinds that models come
with."""

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """You are a helpful assistant. What is two plus three? The answer is five.
Hello there, how are you today? I am fine, thank you.  def add(a, b):
    return a + b
user system assistant tool question answer one two three four five six seven eight nine ten"""

SPECIAL = (
    *(
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<|tool|>",
    ),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

CHATML = """{%- for m in messages -%}
{%- if loop.first and m['role'] != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

LLAMA3 = """{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif -%}"""

MISTRAL = """{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate user, assistant, user, ...') }}
{%- endif -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

GENERATION = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' -}}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

BLOCK_END = " + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
# the block closes before the end token
SHORT_BLOCK = GENERATION.replace(BLOCK_END, " }}{% endgeneration %}{{ '<|im_end|>\n' }}")
# the block takes the line break along
LONG_BLOCK = GENERATION.replace(BLOCK_END, " + '<|im_end|>\n' }}{% endgeneration %}")
# two blocks in a turn that has thinking
TWO_BLOCKS = GENERATION.replace(
    "{% generation %}{{ m.content",
    "{% generation %}{{ m.thinking | default('so') }}{% endgeneration %}{{ '\n\n' }}{% generation"
    " %}{{ m.content",
)

# an EOS behind the last message only, as Phi-3's
PHI3 = """{%- for m in messages -%}
{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""

# an empty thought before the last answer only, and thoughts
# of earlier turns are dropped, as Qwen3's
QWEN3 = """{%- for m in messages -%}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') -%}
{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last -%}
{%- set thought = m.reasoning_content | default('') -%}
{%- if '</think>' in m.content -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] -%}
{%- endif -%}
{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{%- endif -%}
{{ content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

# the generation prompt opens a thought, so no answer without one can follow it
OPEN_THOUGHT = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)
NO_END = CHATML.replace("m['content'] + '<|im_end|>\n'", "m['content'] + '\n'")
NO_PROMPT = CHATML.split("{%- if add_generation_prompt")[0]
NO_SYSTEM = "{%- for m in messages -%}\n" + CHATML.split("{%- endif -%}\n", 1)[1]

# a turn ends where the next role begins, as GLM's
NEXT_ROLE = """{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

# the last turn has another end than the others, as gpt-oss's
CHANNELS = """{%- for m in messages -%}
{{ '<|' + m.role + '|>' + ('final ' if m.role == 'assistant' else '') + m.content }}
{{- eos_token if loop.last and m.role == 'assistant' else '<|end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

# thoughts are dropped, also that of the last turn, which the generation prompt opens: R1's distills
DROPS_THOUGHTS = """{%- for m in messages -%}
{{ '<|' + m.role + '|>' }}
{{- m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -}}
{{ eos_token if m.role == 'assistant' else '' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|><think>\n' }}{%- endif -%}"""

# the system message stands in the last question, where that is the last message, as Mistral v0.3's
SYSTEM_LAST = """{{- bos_token -}}
{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{%- for m in rest -%}
{%- if m.role == 'user' -%}
{%- if loop.last and messages[0].role == 'system' -%}
{{ '[INST] ' + messages[0].content + '\n\n' + m.content + ' [/INST]' }}
{%- else -%}{{ '[INST] ' + m.content + ' [/INST]' }}{%- endif -%}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""

# tools in the first question, calls behind the content
CALLS = """{%- for m in messages -%}
{{ '<|' + m.role + '|>' }}
{%- if loop.first and tools -%}{{ tools | tojson }}{%- endif -%}
{{- m.content -}}
{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}
{{ c.function.name + (c.function.arguments | tojson) }}
{%- endfor -%}{%- endif -%}
{{ '<|end|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""

TOOLS = (
    "{%- if tools -%}{{ '<|im_start|>tools\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{%- endif"
    " -%}" + CHATML
)

EOS = {
    LLAMA3: "<|eot_id|>",
    MISTRAL: "</s>",
    SYSTEM_LAST: "</s>",
    DROPS_THOUGHTS: "</s>",
    PHI3: "<|endoftext|>",
    NEXT_ROLE: "<|endoftext|>",
    CHANNELS: "<|endoftext|>",
}
BOS = {LLAMA3: "<|begin_of_text|>", MISTRAL: "<s>", SYSTEM_LAST: "<s>"}


@functools.cache
def byte_level(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer (SmolLM2, Llama 3, Qwen); it adds BOS to plain text where the
    template has one."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 2, trainer)
    trim: Any = processors.ByteLevel(trim_offsets=True)  # as in the tokenizers of these models
    bos = BOS.get(template or "")
    if bos:
        trim = processors.Sequence([trim, _bos(inner, bos)])
    inner.post_processor = trim
    return _wrap(inner, template, bos)


@functools.cache
def sentencepiece_like(template: str | None = MISTRAL) -> Any:
    """A BPE with a space marker, a dummy prefix and byte fallback (Llama 2, Mistral)."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # pyright: ignore[reportAttributeAccessIssue]
    last: Any = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    inner.decoder = last
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *SPECIAL, *fallback], show_progress=False
    )
    inner.train_from_iterator([TEXT] * 2, trainer)
    inner.post_processor = _bos(inner, "<s>")
    return _wrap(inner, template, "<s>")


def _bos(inner: Tokenizer, bos: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
    )


def _wrap(inner: Tokenizer, template: str | None, bos: str | None) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=EOS.get(template or "", "<|im_end|>")
    )
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str, **keys: Any) -> dict[str, Any]:
    """An assistant's message."""
    return {"role": "assistant", "content": content, **keys}
