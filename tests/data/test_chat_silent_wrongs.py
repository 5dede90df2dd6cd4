"""What real chat templates do that once taught a token that nobody generates, or lost what a row
says, without a word. Each template is a short one of our own that has the structure."""

from typing import Any

import pytest

from megatron_tsft.data.turns import Refusal
from tests.data import chat_tokenizers as t
from tests.data.chat_tokenizers import assistant, user
from tests.data.test_chat_templates import ASK, PLUS, TURN, check, marked

CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 5}}}
CALLING: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "seven"}

# results of a call stand in the turn that calls, found by counting through part of the messages:
# Gemma 4's
RESULTS_INSIDE = """{%- set rest = messages[1:] if messages[0].role == 'system' else messages -%}
{{- '<|system|>' + messages[0].content + '<|end|>' if messages[0].role == 'system' else '' -}}
{%- for m in rest -%}{%- if m.role != 'tool' -%}
{{- '' if loop.index0 and rest[loop.index0 - 1].role == 'tool' else '<|' + m.role + '|>' -}}
{%- if m.tool_calls -%}
{%- for c in m.tool_calls -%}{{ c.function.name + (c.function.arguments | tojson) }}{%- endfor -%}
{%- for k in range(loop.index0 + 1, rest | length) -%}
{%- if rest[k].role != 'tool' -%}{%- break -%}{%- endif -%}
{{- '<|tool|>' + rest[k].content + '<|end|>' -}}
{%- endfor -%}
{%- endif -%}
{{- m.content + '<|end|>' if m.content else '' -}}
{%- endif -%}{%- endfor -%}
{{- '<|assistant|>' if add_generation_prompt and messages[-1].role != 'tool' else '' -}}"""


def test_results_within_the_turn_that_calls_are_not_learnt() -> None:
    head, answer = "<|user|>two<|end|><|assistant|>", assistant("seven it is")
    text = '[[add{"a": 5}<|tool|>]]seven<|end|>[[seven it is<|end|>]]'
    check(RESULTS_INSIDE, [user("two"), CALLING, RESULT, answer], head + text)
    system = {"role": "system", "content": "fine"}
    want = f"<|system|>fine<|end|>{head}{text}"
    check(RESULTS_INSIDE, [system, user("two"), CALLING, RESULT, answer], want)


def test_a_break_ends_a_message() -> None:
    """An inner loop that leaves by `break` has written nothing of the message that it left at."""
    looking = t.NO_SYSTEM.replace(
        "{%- endfor -%}",
        "{%- for n in messages[loop.index:] -%}{%- if n.role == 'assistant' -%}{%- break -%}"
        "{%- endif -%}{{ n.content }}{%- endfor -%}{{ '\n' }}{%- endfor -%}",
        1,
    )
    text = marked(looking, {"messages": [*TURN, user("six"), user("one"), assistant("nine")]})
    first = f"{ASK}two<|im_end|>\n\n{PLUS}[[five<|im_end|>]]\nsixone\n"
    more = f"{ASK}six<|im_end|>\none\n{ASK}one<|im_end|>\n\n{PLUS}"
    assert text == f"{first}{more}[[nine<|im_end|>]]\n\n"


def test_what_a_result_says_of_the_call_is_the_results() -> None:
    """Cohere numbers the calls in a loop over all messages within the result's turn."""
    numbering = t.CALLS.replace(
        "{{- m.content -}}",
        "{%- if m.role == 'tool' -%}{%- for n in messages -%}{%- if n.tool_calls -%}{{ 'call 0 ' }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{{- m.content or '' -}}",
    )
    messages = [user("two"), CALLING, RESULT, assistant("nine")]
    want = '<|user|>two<|end|><|assistant|>[[add{"a": 5}<|end|>]]<|tool|>call 0 seven<|end|>'
    check(numbering, messages, want + "<|assistant|>[[nine<|end|>]]")


def test_a_completion_keeps_what_is_not_learnt_of_it() -> None:
    row = {
        "prompt": [{"role": "system", "content": "fine"}, user("two")],
        "completion": [assistant("five", loss=False), user("six"), assistant("nine")],
    }
    want = "<s>[INST] fine\n\ntwo [/INST] five</s>[INST] six [/INST][[ nine</s>]]"
    assert marked(t.SYSTEM_LAST, row) == want
    row["completion"] = [user("six"), assistant("nine")]
    with pytest.raises(Refusal, match="drops the content of a message of role 'system'|begin with"):
        marked(t.SYSTEM_LAST, row)


def test_a_prompt_that_always_stands_at_the_end() -> None:
    """Command R7B: nothing depends on add_generation_prompt."""
    always = (
        "{%- for m in messages -%}{{ '<|' + m.role + '|>' }}"
        "{{ '<|tool|>' if m.role == 'assistant' else '' }}{{ m.content + '<|end|>' }}{%- endfor -%}"
        "{{ '<|assistant|>' }}"
    )
    head = "<|user|>two<|end|><|assistant|>"
    check(always, TURN, f"{head}[[<|tool|>five<|end|>]]<|assistant|>")
    asked = always + "{{ '<|tool|>' if add_generation_prompt else '' }}"  # Command A
    check(asked, TURN, f"{head}<|tool|>[[five<|end|>]]<|assistant|>")


def test_the_assistant_first_behind_the_templates_own_system_message() -> None:
    want = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{PLUS}[[five<|im_end|>]]\n"
    check(t.CHATML, [assistant("five")], want)


def test_an_empty_answer_behind_a_call_is_not_learnt() -> None:
    """R1's distills write a whole answer of an empty content, and nothing of null."""
    twice = (
        "{%- for m in messages -%}{%- if m.tool_calls -%}{{ '<|assistant|>' }}"
        "{%- for c in m.tool_calls -%}{{ c.function.name + (c.function.arguments | tojson) }}"
        "{%- endfor -%}{{ '<|end|>' }}{%- endif -%}"
        "{%- if m.content is not none -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
        "{%- endif -%}{%- endfor -%}{{ '<|assistant|>' if add_generation_prompt else '' }}"
    )
    want = '<|user|>two<|end|><|assistant|>[[add{"a": 5}<|end|>]]'
    check(twice, [user("two"), CALLING], want)
    check(twice, [user("two"), CALLING | {"content": ""}], want, same=False)
    prints = t.CALLS.replace("m.content -}}", "m.content | string -}}")
    assert "None" not in marked(prints, {"messages": [user("two"), CALLING]})


def test_a_prompt_that_closes_the_thought() -> None:
    """No thought can follow it; an empty one is the prompt's, whether the turn writes it as the
    prompt does or not."""
    closes = t.QWEN3.replace("assistant\n' }}{%- endif", "assistant\n' + mark }}{%- endif")
    kwargs = {"mark": "<think>\n\n</think>\n\n"}
    closes = closes.replace("{%- for", "{%- set mark = mark | default('') -%}\n{%- for", 1)
    thinking = [user("two"), assistant("five", reasoning_content="add two")]
    row = {"messages": thinking, "chat_template_kwargs": kwargs}
    with pytest.raises(Refusal, match="prompt closes the thought, and the row has one"):
        marked(closes, row)
    marked(closes, {"messages": thinking})
    want = f"{ASK}two<|im_end|>\n{PLUS}<think>\n\n</think>\n\n[[five<|im_end|>]]\n"
    assert marked(closes, row | {"messages": TURN}) == want
    short = row | {"messages": TURN, "chat_template_kwargs": {"mark": "<think></think>"}}
    assert marked(closes, short) == want.replace("\n\n[[", "[[\n\n")


def test_an_answer_that_begins_as_the_prompt_goes_on() -> None:
    """The tokenizer has no token <think>, and an answer begins with "<"; a prompt goes on in plain
    text, and an answer begins alike."""
    opened = t.NO_SYSTEM.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    row = {"messages": [user("two"), assistant("<svg>five</svg>")]}
    assert marked(opened, row) == f"{ASK}two<|im_end|>\n{PLUS}[[<svg>five</svg><|im_end|>]]\n"
    plain = t.NO_SYSTEM.replace("assistant\n' }}", "assistant\nThe answer is:\n' }}")
    row = {"messages": [user("two"), assistant("The answer five")]}
    assert marked(plain, row) == f"{ASK}two<|im_end|>\n{PLUS}[[The answer five<|im_end|>]]\n"


def test_a_template_that_needs_what_it_does_not_write() -> None:
    """It raises where the content is empty, and writes nothing of it where it is not."""
    parts = t.NO_SYSTEM.replace("m['content'] +", "(m['content'][0]['text'] | default('')) +")
    with pytest.raises(Refusal, match="drops the content of a message of role 'user'"):
        marked(parts, {"messages": TURN})


def test_parts_of_a_call_that_are_lost() -> None:
    by_id = t.CALLS.replace("c.function.name +", "c.id +")
    with pytest.raises(Refusal, match="drops the name of a tool call"):
        marked(by_id, {"messages": [user("two"), CALLING]})
    bare = t.CALLS.replace(" + (c.function.arguments | tojson)", "")
    with pytest.raises(Refusal, match="drops the arguments of a tool call"):
        marked(bare, {"messages": [user("two"), CALLING]})
    marked(t.CALLS, {"messages": [user("two"), CALLING]})


def test_openais_earlier_call_and_other_keys_of_a_message() -> None:
    tools = {"name": "add", "parameters": {}}
    calling = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    result = {"role": "function", "name": "add", "content": "seven"}
    row = {"messages": [user("two"), calling, result, *TURN], "functions": [tools]}
    now = [user("two"), CALLING, RESULT | {"name": "add"}, *TURN]
    new = {"messages": now, "tools": [{"type": "function", "function": tools}]}
    assert marked(t.CALLS, row) == marked(t.CALLS, new)
    parts = [{"type": "text", "text": "add two"}]
    both = [assistant("five", reasoning_content=said) for said in (parts, "add two")]
    old, new_text = (marked(t.QWEN3, {"messages": [user("two"), message]}) for message in both)
    assert old == new_text and "add two" in old
    for key in ("refusal", "thought", "reasoning_details"):
        with pytest.raises(Refusal, match=f"drops `{key}` of a message"):
            marked(t.NO_SYSTEM, {"messages": [user("two"), assistant("five", **{key: "no"})]})


def test_a_system_message_beside_the_messages() -> None:
    row = {"messages": TURN, "system": "fine"}
    inside = {"messages": [{"role": "system", "content": "fine"}, *TURN]}
    assert marked(t.NO_SYSTEM, row) == marked(t.NO_SYSTEM, inside)
    assert marked(t.NO_SYSTEM, inside | {"system": "fine"}) == marked(t.NO_SYSTEM, inside)
    with pytest.raises(Refusal, match="`system` and a system message"):
        marked(t.NO_SYSTEM, inside | {"system": "other"})
    with pytest.raises(Refusal, match="for which raw text has no place"):
        marked(t.NO_SYSTEM, {"prompt": "two", "completion": "five", "system": "fine"})


def test_a_last_answer_behind_the_loop() -> None:
    """Nemotron Nano v2 goes on from its generation prompt."""
    behind = (
        "{%- for m in messages -%}{%- if not (loop.last and m.role == 'assistant') -%}"
        "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt or messages[-1].role == 'assistant' -%}"
        "{{ '<|assistant|><|tool|>' }}{%- endif -%}"
        "{{- messages[-1].content + '<|end|>' if messages[-1].role == 'assistant' else '' -}}"
    )
    check(behind, TURN, "<|user|>two<|end|><|assistant|><|tool|>[[five<|end|>]]")
    first = "<|user|>two<|end|><|assistant|>[[five<|end|>]]"
    second = "<|user|>six<|end|><|assistant|><|tool|>[[nine<|end|>]]"
    check(behind, [*TURN, user("six"), assistant("nine")], first + second)


def test_a_thought_without_a_line_break() -> None:
    row = {"messages": [user("two"), assistant("<think>hm</think>five")]}
    want = "<|user|>two<|assistant|><think>\n[[hm</think>five</s>]]"
    assert marked(t.DROPS_THOUGHTS, row) == want
    answer = "m.content.split('</think>')[-1]"
    written = t.DROPS_THOUGHTS.replace(answer, f"'</think>' + {answer}")
    with pytest.raises(Refusal, match="its generation prompt has no place for one"):
        marked(written, row)
