"""Chat templates of every structure that models come with: where their turns lie, what they drop,
and a property that holds of any conversation.

Each template is a short one of our own. The oracle of a case is a list of (text, supervised)
pieces, as in test_chat_masks.py.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tsft.data.chat import ChatEncoder
from megatron_tsft.data.marked_template import MarkedTemplate
from megatron_tsft.data.token_text import mark_supervised
from megatron_tsft.data.turns import Refusal
from megatron_tsft.data.written import ChatOptions
from tests.data import chat_tokenizers as t
from tests.data.chat_tokenizers import assistant, byte_level, user

ASK, PLUS = "<|im_start|>user\n", "<|im_start|>assistant\n"
THOUGHT = "<think>\nadd two\n</think>\n\n"


def marked(template: str, row: dict[str, Any], **options: Any) -> str:
    """The text with its supervised parts in [[...]]; the ids must be transformers' own where the
    row is one that it takes."""
    tokenizer = byte_level(template)
    encoder = ChatEncoder(tokenizer, ChatOptions(**options))
    encoded = encoder.encode(row)
    return mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask)


def check(template: str, messages: list[Any], want: str, *, same: bool = True, **row: Any) -> None:
    """The marked text is `want`, and the ids are those of apply_chat_template."""
    tokenizer = byte_level(template)
    encoded = ChatEncoder(tokenizer).encode({"messages": messages, **row})
    assert mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask) == want
    theirs = tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), **row.get("chat_template_kwargs", {})
    )["input_ids"]
    assert (encoded.input_ids.tolist() == theirs) == same


TURN = [user("two"), assistant("five")]
TURNS = [*TURN, user("six"), assistant("nine")]


def test_a_generation_prompt_that_opens_a_thought() -> None:
    """Qwen3-Thinking, Nemotron 3: a finished turn without thought cannot follow the prompt."""
    opened = t.NO_SYSTEM.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    want = f"{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n"
    check(opened, TURN, want)
    row = [user("two"), assistant("<think>\nhm\n</think>\n\nfive")]
    want = f"{ASK}two<|im_end|>\n{PLUS}<think>\n[[hm\n</think>\n\nfive<|im_end|>]]\n"
    check(opened, row, want)


def test_the_next_roles_token_ends_a_turn() -> None:
    """GLM: the token is supervised, and EOS where the text ends before it."""
    check(
        t.NEXT_ROLE,
        TURNS,
        "<|user|>\ntwo<|assistant|>[[\nfive<|user|>]]\nsix<|assistant|>[[\nnine<|endoftext|>]]",
        same=False,  # EOS is appended
    )
    check(
        t.NEXT_ROLE,
        [*TURN, user("six")],
        "<|user|>\ntwo<|assistant|>[[\nfive<|user|>]]\nsix",
    )
    # what begins the model's own turn ends none
    with pytest.raises(Refusal, match="without special token"):
        marked(t.NEXT_ROLE, {"messages": [*TURN, assistant("nine")]})


def test_the_last_turn_has_another_end() -> None:
    """gpt-oss: <|return|> ends the last turn, <|end|> the others."""
    check(
        t.CHANNELS,
        TURNS,
        "<|user|>two<|end|><|assistant|>[[final five<|end|>]]<|user|>six<|end|><|assistant|>"
        "[[final nine<|endoftext|>]]",
    )


def test_the_assistant_speaks_first() -> None:
    check(
        t.NO_SYSTEM,
        [assistant("five"), *TURN],
        f"{PLUS}[[five<|im_end|>]]\n{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n",
    )


def test_an_answer_with_special_tokens_keeps_its_own_end() -> None:
    check(
        t.NO_SYSTEM,
        [user("two"), assistant("say <|im_end|> or </s> now")],
        f"{ASK}two<|im_end|>\n{PLUS}[[say <|im_end|> or </s> now<|im_end|>]]\n",
    )


def test_thoughts_of_earlier_turns() -> None:
    """Qwen3 drops them: as served by default, a row for each turn, or refused."""
    messages = [
        user("two"),
        assistant(THOUGHT + "five"),
        user("six"),
        assistant(THOUGHT + "nine"),
    ]
    first = f"{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n"
    last = f"{ASK}six<|im_end|>\n{PLUS}[[{THOUGHT}nine<|im_end|>]]\n"
    check(t.QWEN3, messages, first + last)
    apart = [
        user("two"),
        assistant("five", reasoning_content="add two"),
        user("six"),
        assistant("nine", reasoning_content="add two"),
    ]
    check(t.QWEN3, apart, first + last)
    with pytest.raises(Refusal, match="drops the thought of an earlier turn"):
        marked(t.QWEN3, {"messages": messages}, history_thinking="refuse")
    tokenizer = byte_level(t.QWEN3)
    encoder = ChatEncoder(tokenizer, ChatOptions(history_thinking="one-row-per-turn"))
    for row in (messages, apart):
        [parts] = encoder.encode_rows([{"messages": row}])
        assert not isinstance(parts, Refusal)
        assert [mark_supervised(tokenizer, part.input_ids, part.loss_mask) for part in parts] == [
            f"{ASK}two<|im_end|>\n{PLUS}[[{THOUGHT}five<|im_end|>]]\n",
            first.replace("[[", "").replace("]]", "") + last,
        ]
    # nothing is lost without thoughts: the conversation stays one row
    [whole] = encoder.encode_rows([{"messages": TURNS}])
    assert not isinstance(whole, Refusal) and len(whole) == 1


def test_a_template_that_drops_every_thought() -> None:
    """R1 distills: the model generates the last turn's behind the prompt, so it stays there."""
    earlier = [user("two"), assistant(THOUGHT + "five"), user("six")]
    want = (
        "<|user|>two<|assistant|>[[\n\nfive</s>]]<|user|>six<|assistant|><think>\n"
        "[[add two\n</think>\n\nnine</s>]]"
    )
    check(t.DROPS_THOUGHTS, [*earlier, assistant(THOUGHT + "nine")], want, same=False)
    # as its makers give answers back: the prompt has opened the thought
    opened = assistant("add two\n</think>\n\nnine")
    check(t.DROPS_THOUGHTS, [*earlier, opened], want, same=False)
    with pytest.raises(Refusal, match="drops `reasoning_content` of the last turn"):
        messages = [user("two"), assistant("five", reasoning_content="add two")]
        marked(t.DROPS_THOUGHTS, {"messages": messages})
    # DeepSeek-V3.1: the prompt closes the thought before it begins
    closed = t.DROPS_THOUGHTS.replace("<|assistant|><think>\n", "<|assistant|></think>")
    with pytest.raises(Refusal, match="has no place for one"):
        marked(closed, {"messages": [user("two"), assistant(THOUGHT + "five")]})


SYSTEM = {"role": "system", "content": "be helpful"}


def test_a_system_message_that_is_lost() -> None:
    """Mistral v0.3 writes it into the last question alone: a finished conversation loses it, its
    prompt does not."""
    with pytest.raises(Refusal, match="of role 'system': write it into the first user's message"):
        marked(t.SYSTEM_LAST, {"messages": [SYSTEM, *TURN]})
    row = {"prompt": [SYSTEM, user("two")], "completion": [assistant("five")]}
    assert marked(t.SYSTEM_LAST, row) == "<s>[INST] be helpful\n\ntwo [/INST][[ five</s>]]"
    row = {"prompt": [SYSTEM, *TURN, user("six")], "completion": [assistant("nine")]}
    assert marked(t.SYSTEM_LAST, row) == (
        "<s>[INST] two [/INST] five</s>[INST] be helpful\n\nsix [/INST][[ nine</s>]]"
    )


def test_what_a_completion_loses_behind_a_served_prompt() -> None:
    """The prompt is rendered as served, and the completion must still be whole."""
    row: dict[str, Any] = {"prompt": [SYSTEM, user("two")]}
    row["completion"] = [assistant("five", reasoning_content="add two and two and one")]
    with pytest.raises(Refusal, match="drops the thought of the completion"):
        marked(t.SYSTEM_LAST, row)
    row["completion"] = [called({"a": 1}, content="five")]
    with pytest.raises(Refusal, match="drops `tool_calls`"):
        marked(t.SYSTEM_LAST, row)


def test_a_template_that_computes_too_much_is_refused() -> None:
    for body in ("{{ 1 // 0 }}", "{{ range(10 ** 9) | list }}", "{{ messages.pop() }}"):
        with pytest.raises(Refusal, match="the chat template refuses it"):
            marked(t.NO_SYSTEM + body, {"messages": TURN})


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def called(arguments: Any, **keys: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **keys}


def test_tool_calls() -> None:
    """A call and the answer are supervised, nothing of the result; arguments and tools may be JSON
    text."""
    result = {"role": "tool", "content": "nine"}
    messages = [user("two"), called({"a": 1}), result, assistant("five")]
    want = (
        '<|user|>[{"type": "function", "function": {"name": "add", "parameters": {"type":'
        ' "object"}}}]two<|end|><|assistant|>[[add{"a": 1}<|end|>]]<|tool|>nine<|end|><|assistant|>'
        "[[five<|end|>]]"
    )
    check(t.CALLS, messages, want, tools=[ADD])
    import json

    messages[1] = called('{"a": 1}', content=None)
    row = {"messages": messages, "tools": json.dumps([ADD])}
    assert marked(t.CALLS, row) == want
    row["tools"] = [json.dumps(ADD)]  # type: ignore[assignment]
    assert marked(t.CALLS, row) == want
    # Arrow gives every argument to every call
    messages[1] = called({"a": 1, "b": None})
    assert marked(t.CALLS, {"messages": messages, "tools": [ADD]}) == want
    # a template that takes arguments as text alone (DeepSeek)
    text = t.CALLS.replace("arguments | tojson", "arguments + ''")
    assert marked(text, {"messages": messages, "tools": [ADD]}) == want
    # a template that knows a call by its missing content (R1)
    silent = t.CALLS.replace("m.tool_calls", "m.content is none and m.tool_calls")
    silent = silent.replace("{{- m.content -}}", "{{- m.content or '' -}}")
    assert marked(silent, {"messages": messages, "tools": [ADD]}) == want


def test_tool_calls_that_are_lost() -> None:
    """SmolLM2, Llama 3: without `tools` in the template's own words, a call leaves an empty
    turn."""
    with pytest.raises(Refusal, match="drops `tool_calls` of a row without `tools`"):
        marked(t.CHATML, {"messages": [user("two"), called({"a": 1}), *TURN]})
    one = t.CALLS.replace("for c in m.tool_calls", "for c in m.tool_calls[:1]")
    twice = called({"a": 1})
    twice["tool_calls"] *= 2
    assert "add" in marked(t.CALLS, {"messages": [user("two"), twice, *TURN], "tools": [ADD]})
    with pytest.raises(Refusal, match="drops `tool_calls`: give"):
        marked(one, {"messages": [user("two"), twice, *TURN], "tools": [ADD]})


def test_content_beside_a_call_that_is_lost() -> None:
    """Llama 3.1 writes the call alone."""
    messages = [user("two"), called({"a": 1}, content="let me see"), *TURN]
    alone = t.CALLS.replace("{{- m.content -}}", "{{- '' if m.tool_calls else m.content -}}")
    assert "let me see" in marked(t.CALLS, {"messages": messages, "tools": [ADD]})
    with pytest.raises(Refusal, match="drops the content of a message of role 'assistant'"):
        marked(alone, {"messages": messages, "tools": [ADD]})
    # short text, which may stand in the output by chance, too
    messages[1] = called({"a": 1}, content="a")
    with pytest.raises(Refusal, match="drops the content"):
        marked(alone, {"messages": messages, "tools": [ADD]})


def test_variables_of_the_template() -> None:
    switch = t.QWEN3.replace(
        "{{ '<|im_start|>assistant\n' }}",
        "{{ '<|im_start|>assistant\n' }}{%- if not (thinking | default(true)) -%}"
        "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}",
    )
    assert switch != t.QWEN3
    row: dict[str, Any] = {"messages": TURN}
    head = f"{ASK}two<|im_end|>\n{PLUS}"
    assert marked(switch, row) == head + "[[<think>\n\n</think>\n\nfive<|im_end|>]]\n"
    row["chat_template_kwargs"] = {"thinking": False}
    want = head + "<think>\n\n</think>\n\n[[five<|im_end|>]]\n"
    assert marked(switch, row) == want
    assert marked(switch, {"messages": TURN}, variables={"thinking": False}) == want
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(Refusal, match=f"`chat_template_kwargs` has '{name}'"):
            marked(switch, {"messages": TURN, "chat_template_kwargs": {name: 1}})
    row["chat_template_kwargs"] = '{"thinking": true}'
    assert marked(switch, row, variables={"thinking": False}).count("[[<think>") == 1


def test_the_day_is_the_same_for_all_rows() -> None:
    dated = "{{ strftime_now('%d %b %Y') + '\n' }}" + t.NO_SYSTEM
    text = marked(dated, {"messages": TURN}, date="2026-11-30")
    assert text.startswith("30 Nov 2026\n<|im_start|>user")


def test_another_template() -> None:
    text = marked(t.MISTRAL, {"messages": TURN}, chat_template=t.NO_SYSTEM)
    assert text == f"{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n"


def test_messages_that_are_not_learnt() -> None:
    """They are context; an empty answer costs its turn alone."""
    first = f"{ASK}two<|im_end|>\n{PLUS}"
    last = f"{ASK}six<|im_end|>\n{PLUS}[[nine<|im_end|>]]\n"
    for off in ({"loss": False}, {"train": False}, {"weight": 0}, {"loss": True, "train": 0}):
        messages = [user("two"), assistant("five", **off), *TURNS[2:]]
        assert marked(t.NO_SYSTEM, {"messages": messages}) == first + "five<|im_end|>\n" + last
    messages = [user("two"), assistant(" "), *TURNS[2:]]
    assert marked(t.NO_SYSTEM, {"messages": messages}) == first + " <|im_end|>\n" + last
    text = marked(t.NO_SYSTEM, {"messages": TURNS}, supervise="last")
    assert text == first + "five<|im_end|>\n" + last
    text = marked(t.NO_SYSTEM, {"messages": TURNS}, supervise="everything")
    assert text.startswith("<|im_start|>[[user\ntwo") and text.endswith("nine<|im_end|>\n]]")


def test_weights_of_messages() -> None:
    tokenizer = byte_level(t.NO_SYSTEM)
    messages = [user("two"), assistant("five", weight=0.5), user("six"), assistant("nine")]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages, "weight": -3})
    assert encoded.token_weights is not None
    found = encoded.token_weights[encoded.loss_mask].tolist()
    half = len(tokenizer("five<|im_end|>")["input_ids"])
    assert found == [-1.5] * half + [-3] * (len(found) - half) and len(found) > half
    assert not encoded.token_weights[~encoded.loss_mask].any()


@pytest.mark.parametrize("key", ["loss_weight", "mask", "train_on_turn", "weights", "is_masked"])
def test_keys_that_would_decide_what_is_learnt_are_not_ignored(key: str) -> None:
    with pytest.raises(Refusal, match=f"`{key}` of a message is not known"):
        marked(t.CHATML, {"messages": [user("two"), assistant("five") | {key: 0}]})
    with pytest.raises(Refusal, match=f"`{key}` of the row is not known"):
        marked(t.CHATML, {"messages": TURN, key: 0})


def test_content_parts() -> None:
    parts = [{"type": "text", "text": "fi"}, {"type": "text", "text": "ve"}]
    row = {"messages": [user("two"), {"role": "assistant", "content": parts}]}
    assert marked(t.NO_SYSTEM, row) == f"{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n"


def test_plain_text() -> None:
    assert marked(t.LLAMA3, {"text": "two plus"}) == "<|begin_of_text|>[[two plus<|eot_id|>]]"


# ---- loops


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("a slice", t.NO_SYSTEM.replace("in messages", "in messages[0:]")),
        (
            "another name",
            "{%- set turns = messages -%}" + t.NO_SYSTEM.replace("in messages", "in turns"),
        ),
        (
            "places",
            t.NO_SYSTEM.replace("for m in messages", "for i in range(messages | length)").replace(
                "{{ '<|im_start|>' + m", "{%- set m = messages[i] -%}{{ '<|im_start|>' + m", 1
            ),
        ),
        (
            "continue",
            t.NO_SYSTEM.replace(
                "{%- endfor -%}",
                "{%- if m.role == 'user' -%}{%- continue -%}{%- endif -%}{{ '' }}{%- endfor -%}",
            ),
        ),
        (
            "a macro",
            t.NO_SYSTEM.replace("{%- for", "{%- macro all() -%}{%- for", 1).replace(
                "{%- endfor -%}", "{%- endfor -%}{%- endmacro -%}{{ all() }}", 1
            ),
        ),
        (
            "a loop that writes nothing before",
            "{%- for m in messages[::-1] -%}{%- set x = m -%}{%- endfor -%}" + t.NO_SYSTEM,
        ),
    ],
)
def test_loops_of_every_kind(name: str, template: str) -> None:
    want = f"{ASK}two<|im_end|>\n{PLUS}[[five<|im_end|>]]\n{ASK}six<|im_end|>\n{PLUS}[[nine"
    check(template, TURNS, want + "<|im_end|>]]\n")


def test_what_has_no_loop_or_takes_it_apart_is_refused() -> None:
    unrolled = "{{ messages[0].content + '<|assistant|>' + messages[1].content + '<|end|>' }}"
    with pytest.raises(Refusal, match="outside a loop over the messages"):
        marked(unrolled, {"messages": TURN})
    counted = (
        "{%- set all -%}{%- for m in messages -%}{{ m.content + '<|end|>' }}{%- endfor -%}"
        "{%- endset -%}{{ all | length }}{{ all }}"
    )
    with pytest.raises(Refusal, match="takes its loop's output apart"):
        marked(counted, {"messages": TURN})
    twice = t.NO_SYSTEM + t.NO_SYSTEM
    with pytest.raises(Refusal, match="in several places"):
        marked(twice, {"messages": TURN})


# ---- any conversation

TEMPLATES = {
    "chatml": t.CHATML,
    "llama3": t.LLAMA3,
    "mistral": t.MISTRAL,
    "generation": t.GENERATION,
    "phi3": t.PHI3,
    "qwen3": t.QWEN3,
    "open thought": t.OPEN_THOUGHT,
    "next role": t.NEXT_ROLE,
    "channels": t.CHANNELS,
    "drops thoughts": t.DROPS_THOUGHTS,
}
WORDS = st.text("ab \n.é中😀", min_size=1, max_size=30).filter(lambda text: text.strip())
ANSWERS = st.tuples(st.booleans(), WORDS).map(lambda it: f"{THOUGHT if it[0] else ''}{it[1]}")


@settings(max_examples=150)
@given(
    pairs=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_what_the_model_generates_is_supervised_and_nothing_else(
    pairs: list[tuple[str, str]], name: str
) -> None:
    """By prefix comparison, where it can tell: the last turn is what follows the generation prompt
    of the conversation before it, up to and with its end token; earlier questions are not
    supervised."""
    template = TEMPLATES[name]
    tokenizer = byte_level(template)
    messages = [m for question, answer in pairs for m in (user(question), assistant(answer))]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages})
    ids, mask = encoded.input_ids, encoded.loss_mask
    text = tokenizer.decode(ids.tolist())
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt="add_generation_prompt" in template
    )
    # where the turn begins otherwise than the prompt, they part inside the opened thought
    common = next(
        (i for i, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), len(prompt)
    )
    assert common == len(prompt) or prompt[common:].startswith("<think>") or "mistral" in name
    last = mask.copy()
    borders = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    last[: borders[-2]] = False
    written = tokenizer.decode(ids[last].tolist())
    end = "</s>" if name in ("mistral", "drops thoughts") else None
    end = end or ("<|end|>" if name == "phi3" else tokenizer.eos_token)
    assert text[common:].startswith(written) and written.endswith(end)
    assert not text[common + len(written) :].replace("<|endoftext|>", "").strip()
    # nobody's words but the assistant's
    context = tokenizer.decode(ids[~mask].tolist())
    for question, _ in pairs:
        assert question.strip() in context
    assert MarkedTemplate(template).render(
        messages, **tokenizer.special_tokens_map, add_generation_prompt=False
    ) == tokenizer.apply_chat_template(messages, tokenize=False)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The stretches [start, stop) of a mask."""
    borders = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))


@settings(max_examples=100)
@given(
    pairs=st.lists(
        st.tuples(WORDS, ANSWERS, st.sampled_from([0.5, 1.0, 2.0, -1.0]), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(sorted(TEMPLATES)),
)
def test_each_turn_is_one_stretch_and_carries_its_own_weight(
    pairs: list[tuple[str, str, float, bool]], name: str
) -> None:
    """Every turn, also an earlier one, begins where its prompt ends, where the text goes on as the
    prompt does; turns that are off, and weights, change no other turn."""
    template = TEMPLATES[name]
    tokenizer = byte_level(template)
    messages = [m for q, a, _, _ in pairs for m in (user(q), assistant(a))]
    plain = ChatEncoder(tokenizer).encode({"messages": messages})
    whole, text = runs(plain.loss_mask), tokenizer.decode(plain.input_ids.tolist())
    assert len(whole) == len(pairs)
    for turn, (start, _) in enumerate(whole):
        prompt = tokenizer.apply_chat_template(
            messages[: 2 * turn + 1],
            tokenize=False,
            add_generation_prompt="add_generation_prompt" in template,
        )
        if text.startswith(prompt) and "mistral" not in name:
            assert tokenizer.decode(plain.input_ids[:start].tolist()) == prompt
    flagged = [
        m for q, a, weight, on in pairs for m in (user(q), assistant(a, weight=weight, loss=on))
    ]
    on = [stretch for stretch, pair in zip(whole, pairs, strict=True) if pair[3]]
    if not on:
        with pytest.raises(Refusal, match="no assistant message is to be learnt"):
            ChatEncoder(tokenizer).encode({"messages": flagged})
        return
    found = ChatEncoder(tokenizer).encode({"messages": flagged})
    assert np.array_equal(found.input_ids[: on[-1][1]], plain.input_ids[: on[-1][1]])
    assert runs(found.loss_mask) == on
    want = np.zeros(len(found.input_ids), np.float32)
    for (start, stop), (_, _, weight, flag) in zip(whole, pairs, strict=True):
        want[start:stop] = weight if flag else 0
    if found.token_weights is None:
        assert all(pair[2] == 1 for pair in pairs if pair[3])
    else:
        assert np.array_equal(found.token_weights, want)
