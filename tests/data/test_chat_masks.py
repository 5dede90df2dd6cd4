"""Which tokens of a conversation are supervised, token by token, for each kind of chat template.

The oracle of a case is a list of (text, supervised) pieces, each tokenised alone: their borders are
borders of tokens, because a special token, a line break or a space stands there.
"""

import copy
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from megatron_tsft.data.chat import ChatEncoder
from megatron_tsft.data.token_text import mark_supervised
from megatron_tsft.data.turns import Refusal
from megatron_tsft.errors import UserError
from tests.data import chat_tokenizers as t
from tests.data.chat_tokenizers import assistant, byte_level, sentencepiece_like, user

Pieces = list[tuple[str, bool]]
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TWO_TURNS = [
    user("one plus two?"),
    assistant("three"),
    user("and four?"),
    assistant("seven, I am fine"),
]
DEFAULT_CHATML: Pieces = [
    ("<|im_start|>user\none plus two?<|im_end|>\n<|im_start|>assistant\n", False),
    ("three<|im_end|>", True),
    ("\n<|im_start|>user\nand four?<|im_end|>\n<|im_start|>assistant\n", False),
    ("seven, I am fine<|im_end|>", True),
    ("\n", False),
]
WITH_SYSTEM: Pieces = [(SYSTEM, False), *DEFAULT_CHATML]

CASES: dict[str, tuple[str, Pieces]] = {
    "chatml": (t.CHATML, WITH_SYSTEM),
    "llama3": (
        t.LLAMA3,
        [
            (
                "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none plus"
                " two?<|eot_id|>",
                False,
            ),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("three<|eot_id|>", True),
            ("<|start_header_id|>user<|end_header_id|>\n\nand four?<|eot_id|>", False),
            ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
            ("seven, I am fine<|eot_id|>", True),
        ],
    ),
    "mistral": (
        t.MISTRAL,
        [
            ("<s>[INST] one plus two? [/INST]", False),
            (" three</s>", True),
            ("[INST] and four? [/INST]", False),
            (" seven, I am fine</s>", True),
        ],
    ),
    "generation block": (t.GENERATION, DEFAULT_CHATML),
    "block closed before the end token": (t.SHORT_BLOCK, DEFAULT_CHATML),
    "block with the line break": (t.LONG_BLOCK, DEFAULT_CHATML),
    "two blocks a turn": (
        t.TWO_BLOCKS,
        [
            ("<|im_start|>user\none plus two?<|im_end|>\n<|im_start|>assistant\n", False),
            ("so", True),
            ("\n\n", False),
            ("three<|im_end|>", True),
            ("\n<|im_start|>user\nand four?<|im_end|>\n<|im_start|>assistant\n", False),
            ("so", True),
            ("\n\n", False),
            ("seven, I am fine<|im_end|>", True),
            ("\n", False),
        ],
    ),
    "an EOS behind the last turn": (
        t.PHI3,
        [
            ("<|user|>\none plus two?<|end|>\n<|assistant|>\n", False),
            ("three<|end|>", True),
            ("\n<|user|>\nand four?<|end|>\n<|assistant|>\n", False),
            ("seven, I am fine<|end|>", True),
            ("\n<|endoftext|>", False),
        ],
    ),
    "an empty thought before the last answer": (
        t.QWEN3,
        [
            *DEFAULT_CHATML[:3],
            ("<think>\n\n</think>\n\nseven, I am fine<|im_end|>", True),
            ("\n", False),
        ],
    ),
    "no generation prompt": (t.NO_PROMPT, WITH_SYSTEM),
}


def expected(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    ids, mask = [], []
    for text, supervised in pieces:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        mask += [supervised] * len(part)
    return ids, mask


def check(tokenizer: Any, row: dict[str, Any], pieces: Pieces) -> None:
    encoded = ChatEncoder(tokenizer).encode(row)
    ids, mask = expected(tokenizer, pieces)
    assert tokenizer.convert_ids_to_tokens(
        encoded.input_ids.tolist()
    ) == tokenizer.convert_ids_to_tokens(ids)
    assert encoded.loss_mask.tolist() == mask, mark_supervised(
        tokenizer, encoded.input_ids, encoded.loss_mask
    )
    assert encoded.input_ids.dtype == np.int32 and encoded.loss_mask.dtype == np.bool_
    assert encoded.token_weights is None


@pytest.mark.parametrize("name", CASES)
def test_masks_of_two_turns(name: str) -> None:
    template, pieces = CASES[name]
    check(byte_level(template), {"messages": TWO_TURNS}, pieces)
    ids = byte_level(template).apply_chat_template(TWO_TURNS)["input_ids"]
    assert (
        ids == expected(byte_level(template), pieces)[0]
    )  # the oracle tokenises as the library does


def test_a_sentencepiece_tokenizer() -> None:
    """Its prefix space makes pieces differ from the whole, so the tokens are written down."""
    tokenizer = sentencepiece_like()
    encoded = ChatEncoder(tokenizer).encode(
        {"messages": [user("two"), assistant("five \U0001f600")]}
    )
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    supervised = [token for token, flag in zip(tokens, encoded.loss_mask, strict=True) if flag]
    assert tokens == tokenizer.convert_ids_to_tokens(
        tokenizer.apply_chat_template([user("two"), assistant("five \U0001f600")])["input_ids"]
    )
    assert supervised == ["▁five", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "</s>"]
    assert encoded.loss_mask[-7:].all() and not encoded.loss_mask[:-7].any()


def test_the_library_agrees_on_generation_blocks() -> None:
    tokenizer = byte_level(t.GENERATION)
    out = tokenizer.apply_chat_template(TWO_TURNS, return_assistant_tokens_mask=True)
    encoded = ChatEncoder(tokenizer).encode({"messages": TWO_TURNS})
    assert encoded.input_ids.tolist() == out["input_ids"]
    assert encoded.loss_mask.tolist() == [bool(flag) for flag in out["assistant_masks"]]


def test_every_byte_of_a_last_character_is_supervised() -> None:
    """Where a block ends in a character of several tokens, the library's own mask leaves out all
    but its first."""
    template = t.SHORT_BLOCK.replace(
        "{% endgeneration %}{{ '<|im_end|>\n' }}", "{% endgeneration %}{{ ' <|im_end|>' }}"
    )
    tokenizer, messages = byte_level(template), [user("two"), assistant("five\U0001f600")]
    encoded = ChatEncoder(tokenizer).encode({"messages": messages})
    assert mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask).endswith(
        "[[five\U0001f600 <|im_end|>]]"
    )
    library = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)[
        "assistant_masks"
    ]
    assert encoded.loss_mask.sum() == sum(library) + 3 + 2  # 3 bytes, the space and the end token


def test_tokens_of_spaces_are_supervised() -> None:
    """The tokenizer's own offsets give a token of spaces no characters; code must keep its
    indentation."""
    tokenizer = byte_level()
    code = "def add(a, b):\n            return a  +  b"
    encoded = ChatEncoder(tokenizer).encode({"messages": [user("two"), assistant(code)]})
    assert mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask).endswith(
        f"[[{code}<|im_end|>]]\n"
    )
    offsets = tokenizer(code, return_offsets_mapping=True)["offset_mapping"]
    assert any(start == end for start, end in offsets)  # the danger is real


def test_a_token_across_the_border_is_supervised() -> None:
    tokenizer = byte_level()
    line_breaks = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    encoded = ChatEncoder(tokenizer).encode(
        {"messages": [user("two"), assistant("\n    return a")]}
    )
    text = mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask)
    assert len(line_breaks) == 2 and text.endswith("assistant\n[[\n    return a<|im_end|>]]\n")
    encoded = ChatEncoder(byte_level(t.LLAMA3)).encode(
        {"messages": [user("two"), assistant("  five  ")]}
    )
    assert mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask).endswith(
        "[[five<|eot_id|>]]"
    )


def test_a_header_token_that_swallows_space_is_not_supervised() -> None:
    """Phi-3's <|assistant|> takes the white space behind it along, also that of the answer."""
    tokenizer = copy.deepcopy(byte_level(t.PHI3))
    tokenizer.add_tokens(
        [AddedToken("<|assistant|>", rstrip=True, special=True)], special_tokens=True
    )
    encoded = ChatEncoder(tokenizer).encode({"messages": [user("two"), assistant("  five")]})
    text = mark_supervised(tokenizer, encoded.input_ids, encoded.loss_mask)
    assert text == "<|user|>\ntwo<|end|>\n<|assistant|>[[five<|end|>]]\n<|endoftext|>"


def test_system_tool_and_consecutive_assistant_messages() -> None:
    messages = [
        {"role": "system", "content": "You are fine."},
        user("two"),
        assistant("one"),
        {"role": "tool", "content": "nine"},
        assistant("ten"),
        assistant("six"),
        user("thank you"),
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    pieces = [
        (
            '<|im_start|>tools\n[{"type": "function", "function": {"name": "add"}}]<|im_end|>\n',
            False,
        ),
        (
            "<|im_start|>system\nYou are"
            " fine.<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("one<|im_end|>", True),
        ("\n<|im_start|>tool\nnine<|im_end|>\n<|im_start|>assistant\n", False),
        ("ten<|im_end|>", True),
        ("\n<|im_start|>assistant\n", False),
        ("six<|im_end|>", True),
        ("\n<|im_start|>user\nthank you<|im_end|>\n", False),
    ]
    check(byte_level(t.TOOLS), {"messages": messages, "tools": tools}, pieces)
    check(byte_level(t.CHATML), {"messages": messages, "tools": []}, pieces[1:])
    check(
        byte_level(t.CHATML),
        {"messages": messages, "prompt": "as some data sets have", "id": 7},
        pieces[1:],
    )
    with pytest.raises(Refusal, match="`tools`, which the chat template does not use"):
        ChatEncoder(byte_level(t.CHATML)).encode({"messages": messages, "tools": tools})


def test_a_completion_of_messages() -> None:
    for template in (t.GENERATION, t.CHATML):
        pieces = DEFAULT_CHATML if template == t.GENERATION else WITH_SYSTEM
        later = [(text, flag and "seven" in text) for text, flag in pieces]
        row = {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}
        check(byte_level(template), row, later)
        check(byte_level(template), {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:]}, pieces)
    pieces = CASES["two blocks a turn"][1]
    later = [(text, flag and i > 4) for i, (text, flag) in enumerate(pieces)]
    check(byte_level(t.TWO_BLOCKS), {"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, later)


def test_raw_text() -> None:
    chatml, llama, spaced = byte_level(), byte_level(t.LLAMA3), sentencepiece_like()
    check(
        chatml,
        {"prompt": "two plus", "completion": " three"},
        [("two plus", False), (" three<|im_end|>", True)],
    )
    check(
        chatml,
        {"prompt": "two plus", "completion": " five<|im_end|>"},
        [("two plus", False), (" five<|im_end|>", True)],
    )
    bos = ("<|begin_of_text|>two plus", False)
    check(llama, {"prompt": "two plus", "completion": " three"}, [bos, (" three<|eot_id|>", True)])
    check(
        llama,
        {"prompt": "", "completion": " three"},
        [("<|begin_of_text|>", False), (" three<|eot_id|>", True)],
    )
    # no space is gained at the border, which the text does not have
    encoded = ChatEncoder(spaced).encode({"prompt": "two\n", "completion": "three"})
    tokens = spaced.convert_ids_to_tokens(encoded.input_ids.tolist())
    assert "".join(tokens) == "<s>▁two\nthree</s>"
    supervised = [x for x, flag in zip(tokens, encoded.loss_mask, strict=True) if flag]
    assert "".join(supervised) == "three</s>"
    # a prompt that a template has written has its BOS
    check(
        llama,
        {"prompt": "<|begin_of_text|>two", "completion": " three<|eot_id|>"},
        [("<|begin_of_text|>two", False), (" three<|eot_id|>", True)],
    )
    encoded = ChatEncoder(chatml).encode({"prompt": "", "completion": "three four"})
    assert encoded.loss_mask.tolist() == [False] + [True] * (
        len(encoded.input_ids) - 1
    )  # nothing predicts the first
    check(
        byte_level(None),
        {"prompt": "two", "completion": " three"},
        [("two", False), (" three<|im_end|>", True)],
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (t.NO_END, [user("a"), assistant("b")], "without special token"),
        # the next turn's <|im_start|> is no end
        (t.NO_END, [user("a"), assistant("b"), user("c")], "without special token"),
        (
            t.NO_END.replace("m['role'] + '\\n'", "m['role']"),
            [user("a"), assistant("b")],
            "without special token",
        ),
        (t.MISTRAL, [user("a"), user("a"), assistant("b")], "refuses it: roles must alternate"),
        (
            t.MISTRAL.replace("m.content +", "m.content + 3 +"),
            [user("a"), assistant("b")],
            "refuses it: can only concat",
        ),
        (
            t.GENERATION.replace(" + '<|im_end|>'", ""),
            [user("a"), assistant("b")],
            "without special token",
        ),
        (t.CHATML, [user("a"), assistant("\ud800")], "surrogate"),
    ],
)
def test_what_cannot_be_told_exactly_is_refused(
    template: str, messages: list[Any], reason: str
) -> None:
    with pytest.raises(Refusal, match=reason):
        ChatEncoder(byte_level(template)).encode({"messages": messages})


def test_thinking_in_the_last_turn_is_supervised() -> None:
    row = {"messages": [user("a"), assistant("<think>\nhm\n</think>\n\nb")]}
    pieces = [("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False)]
    check(
        byte_level(t.QWEN3),
        row,
        [*pieces, ("<think>\nhm\n</think>\n\nb<|im_end|>", True), ("\n", False)],
    )


def test_an_answer_first_where_the_template_has_blocks() -> None:
    pieces = [("<|im_start|>assistant\n", False), ("three<|im_end|>", True), ("\n", False)]
    check(byte_level(t.GENERATION), {"messages": [assistant("three")]}, pieces)


def test_what_no_row_survives_is_the_users_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(byte_level(None)).encode({"messages": TWO_TURNS})
    with pytest.raises(UserError, match="no valid Jinja"):
        ChatEncoder(byte_level("{% for m in messages %}{{ m.content ")).encode(
            {"messages": TWO_TURNS}
        )
