"""What the keys of a row decide: weights, critical spans, and which rows are refused; and masks of
any conversation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tsft.data.chat import ChatEncoder, Encoded
from megatron_tsft.data.token_text import mark_supervised
from megatron_tsft.data.turns import Refusal
from tests.data import chat_tokenizers as t
from tests.data.chat_tokenizers import assistant, byte_level, sentencepiece_like, user


def weighted_tokens(tokenizer: Any, encoded: Encoded) -> list[tuple[str, float]]:
    """(decoded token, its weight) of the supervised tokens; the others must weigh nothing."""
    assert encoded.token_weights is not None and encoded.token_weights.dtype == np.float32
    assert not encoded.token_weights[~encoded.loss_mask].any()
    ids, weights = (
        encoded.input_ids[encoded.loss_mask].tolist(),
        encoded.token_weights[encoded.loss_mask].tolist(),
    )
    return [(tokenizer.decode([i]), weight) for i, weight in zip(ids, weights, strict=True)]


def test_critical_spans_of_a_completion() -> None:
    """' answer' lies at [4, 11); a token that a span cuts counts wholly."""
    tokenizer = byte_level()
    for spans, chosen in (
        ([[4, 11]], {" answer"}),
        ([[6, 7]], {" answer"}),
        ([[3, 5]], {" The", " answer"}),
    ):
        encoded = ChatEncoder(tokenizer).encode(
            {"prompt": "two", "completion": " The answer is", "critical": spans}
        )
        found = weighted_tokens(tokenizer, encoded)
        assert [token for token, _ in found] == [" The", " answer", " is", "<|im_end|>"]
        assert {token for token, weight in found if weight == 1} == chosen
        assert {weight for token, weight in found if token not in chosen} == {0}
    row = {
        "prompt": "two",
        "completion": " The answer is",
        "critical": [[0, 1], [13, 14]],
        "weight": 2.5,
    }
    assert weighted_tokens(tokenizer, ChatEncoder(tokenizer).encode(row)) == [
        (" The", 2.5),
        (" answer", 0),
        (" is", 2.5),
        ("<|im_end|>", 0),
    ]


def test_a_critical_character_of_several_tokens() -> None:
    tokenizer = sentencepiece_like()
    row = {"prompt": "two", "completion": "five \U0001f600 six", "critical": [[5, 6]]}
    encoded = ChatEncoder(tokenizer).encode(row)
    assert encoded.token_weights is not None
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.token_weights == 1].tolist())
    assert [token for token in tokens if token != "▁"] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


@pytest.mark.parametrize(
    "template", [t.CHATML, t.LLAMA3, t.MISTRAL, t.GENERATION, t.QWEN3, t.PHI3, t.NO_PROMPT]
)
def test_critical_spans_of_messages(template: str) -> None:
    """A word that occurs in the prompt, in the header ('assistant') and twice in the content is
    told apart."""
    tokenizer = byte_level(template)
    content = " assistant, answer the assistant"
    spans = [[content.rindex(" assistant"), len(content)]]
    messages = [
        user("assistant"),
        assistant("the answer"),
        user("answer the assistant"),
        assistant(content, critical=spans),
    ]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages})
    assert encoded.token_weights is not None
    chosen = np.flatnonzero(encoded.token_weights)
    assert tokenizer.decode(encoded.input_ids[chosen].tolist()) == " assistant"
    end = tokenizer.eos_token if template != t.PHI3 else "<|end|>"
    assert (
        tokenizer.decode([encoded.input_ids[chosen[-1] + 1]]) == end
    )  # the last of them, before the end token
    bare = [
        {key: value for key, value in message.items() if key != "critical"} for message in messages
    ]
    plain = ChatEncoder(tokenizer).encode({"messages": bare})
    assert plain.token_weights is None
    assert np.array_equal(plain.input_ids, encoded.input_ids) and np.array_equal(
        plain.loss_mask, encoded.loss_mask
    )


def test_critical_spans_where_the_template_strips() -> None:
    tokenizer = byte_level(t.LLAMA3)
    row = {"messages": [user("two"), assistant("  a is answer  ", critical=[[0, 3], [7, 15]])]}
    found = weighted_tokens(tokenizer, ChatEncoder(tokenizer).encode(row))
    assert "".join(token for token, weight in found if weight) == "a answer"
    assert found[-1] == ("<|eot_id|>", 0)


def test_critical_spans_where_the_turn_says_the_content_twice() -> None:
    """The template writes <think> before the content 'think'."""
    tokenizer = byte_level(t.QWEN3)
    encoded = ChatEncoder(tokenizer).encode(
        {"messages": [user("two"), assistant("think", critical=[[0, 5]])]}
    )
    found = weighted_tokens(tokenizer, encoded)
    text = "".join(token for token, _ in found)
    chosen = "".join(token if weight else "." * len(token) for token, weight in found)
    assert chosen.strip(".") == "think" and chosen.index("think") == text.rindex("think")


def test_an_empty_list_of_spans_chooses_nothing() -> None:
    tokenizer = byte_level()
    encoded = ChatEncoder(tokenizer).encode(
        {"messages": [user("two"), assistant("five", critical=[])], "weight": 3}
    )
    assert encoded.loss_mask.any() and {
        weight for _, weight in weighted_tokens(tokenizer, encoded)
    } == {0}


def test_a_weight_alone_weighs_every_supervised_token() -> None:
    tokenizer = byte_level()
    for weight in (0, 1, 0.1):
        encoded = ChatEncoder(tokenizer).encode(
            {"messages": [user("two"), assistant("five")], "weight": weight}
        )
        assert {value for _, value in weighted_tokens(tokenizer, encoded)} == {
            float(np.float32(weight))
        }


def test_null_is_a_missing_key() -> None:
    """As Arrow gives back rows that have different keys."""
    tokenizer = byte_level(t.TOOLS)
    row: dict[str, Any] = {"messages": [user("two"), assistant("five")]}
    messages = [
        message | {"critical": None, "weight": None, "tool_calls": None}
        for message in row["messages"]
    ]
    filled = {"messages": messages, "tools": None, "weight": None, "critical": None, "prompt": None}
    left, right = ChatEncoder(tokenizer).encode(row), ChatEncoder(tokenizer).encode(filled)
    assert np.array_equal(left.input_ids, right.input_ids) and right.token_weights is None


def test_tool_calls_may_stand_without_content() -> None:
    template = t.CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +"
    )
    calls = [{"name": "add", "arguments": {"a": 1}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    tokenizer = byte_level(template)
    encoded = ChatEncoder(tokenizer).encode({"messages": [user("two"), message]})
    text = mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask)
    assert text.endswith('assistant\n[[[{"name": "add", "arguments": {"a": 1}}]<|im_end|>]]\n')


GOOD = [user("two"), assistant("five")]
COMPLETION = {"prompt": "two", "completion": "five"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither `messages`, nor `prompt` and `completion`, nor `text`"),
        ({"prompt": "two"}, "neither"),
        ({"prompt": "two", "completion": None}, "neither"),
        ({"prompt": "two", "completion": GOOD[1:]}, "neither two strings nor two lists"),
        ({"prompt": "two", "completion": " \n"}, "the completion is empty"),
        ({"prompt": GOOD, "completion": [user("two")]}, "no assistant turn"),
        ({"messages": "two"}, "not a list of objects"),
        ({"messages": ["two"]}, "not a list of objects"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [user("two")]}, "no assistant turn"),
        ({"messages": [{"content": "two"}, *GOOD]}, "no `role`"),
        ({"messages": [{"from": "human", "value": "two"}]}, "no `role`"),
        ({"messages": [{"role": "user"}, GOOD[1]]}, "neither a string nor a list of text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, GOOD[1]]},
            "a content part is of type 'image', not text",
        ),
        ({"messages": [user("two"), assistant(" ")]}, "every assistant message is empty"),
        ({"messages": [user("two"), assistant("five", weight=0)]}, "no assistant message is to be"),
        ({"messages": [user("two") | {"critical": []}, GOOD[1]]}, "not the assistant's"),
        ({"messages": GOOD, "critical": [[0, 1]]}, "stands in the row"),
        ({"messages": GOOD, "tools": "[}"}, "`tools` is text that is no JSON"),
        ({"messages": GOOD, "tools": "{}"}, "`tools` is not a list"),
        ({"messages": GOOD, "tools": ["add"]}, "`tools` is text that is no JSON"),
        *(
            (COMPLETION | {"weight": weight}, "`weight` is not a number")
            for weight in (float("nan"), 1e39, True, "1")
        ),
        *(
            (COMPLETION | {"critical": spans}, "not a list of")
            for spans in (
                [[0, 5]],
                [[2, 2]],
                [[-1, 2]],
                [[0.0, 1]],
                [[0, True]],
                [[0]],
                [0, 1],
                "0",
            )
        ),
        ({"messages": [user("two"), assistant("five", critical=[[0, 5]])]}, "not a list of"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        ChatEncoder(byte_level(t.TOOLS)).encode(row)


def test_critical_spans_without_place_are_refused() -> None:
    changed = t.CHATML.replace("m['content'] +", "m['content'] | upper +")
    row = {"messages": [user("two"), assistant("five", critical=[[0, 1]])]}
    with pytest.raises(Refusal, match="changes an assistant message, so `critical` has no place"):
        ChatEncoder(byte_level(changed)).encode(row)
    twice = t.CHATML.replace("m['content'] +", "m['content'] + m['content'] + '.' +")
    with pytest.raises(Refusal, match="no place"):
        ChatEncoder(byte_level(twice)).encode(row)


# printable text of several scripts, spaces and line breaks; no angle brackets: users' special
# tokens are special tokens
CONTENT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="<>")
) | st.text("ab \n.\u00e9\u4e2d\U0001f600")
ANSWER = CONTENT.filter(lambda text: text.strip())


@settings(max_examples=60)
@given(
    pairs=st.lists(st.tuples(CONTENT, ANSWER), min_size=1, max_size=3),
    template=st.sampled_from(
        [t.CHATML, t.LLAMA3, t.MISTRAL, t.GENERATION, t.SHORT_BLOCK, t.PHI3, t.NO_PROMPT]
    ),
)
def test_supervised_tokens_decode_to_the_answers_and_their_ends(
    pairs: list[tuple[str, str]], template: str
) -> None:
    tokenizer = byte_level(template)
    messages = [
        message for question, answer in pairs for message in (user(question), assistant(answer))
    ]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages})
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert encoded.input_ids.tolist() == ids  # what inference sees is what was trained
    answers = [answer for _, answer in pairs]
    if template == t.LLAMA3:
        answers = [answer.strip() for answer in answers]
    if template == t.MISTRAL:
        answers = [" " + answer for answer in answers]
    end = "<|end|>" if template == t.PHI3 else tokenizer.eos_token
    expected = "".join(answer + end for answer in answers)
    found = tokenizer.decode(
        encoded.input_ids[encoded.loss_mask].tolist(), clean_up_tokenization_spaces=False
    )
    assert found == expected
