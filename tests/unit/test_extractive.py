"""The summarizer without a model: what it keeps, its bound, and that steps make no difference."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.model.types import Item
from buffer.summaries.extractive import Extractive, roll_forward
from buffer.summaries.text import cut_to_bytes, encodable, said
from tests.unit.strategies import json_values


def item(body: dict[str, Any]) -> Item:
    return Item(body, id="m", position=1, created_at=None)


def user(text: str) -> Item:
    return item({"role": "user", "content": text})


def lines(*bodies: dict[str, Any], most: int = 8_192) -> list[str]:
    return roll_forward(None, map(item, bodies), most).split("\n")


def test_one_line_for_each_message_of_user_and_assistant() -> None:
    """In both shapes, with its line breaks gone; calls by name; nothing of the rest."""
    kept = lines(
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "Where is\n my order 4711?"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "find_order", "arguments": '{"id": 4711}'},
        {"type": "function_call_output", "call_id": "1", "output": "secret result"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "It is on its way."}],
        },
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [{"id": "2", "type": "function", "function": {"name": "track", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "2", "content": "secret result"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "https://image.example"}]},
        {"role": "user", "content": ""},
        {"anything": "else"},
    )
    assert kept == [
        "user: Where is my order 4711?",
        "assistant: [calls find_order]",
        "assistant: It is on its way.",
        "assistant: Let me look. [calls track]",
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("short", "short"),
        ("One. " + "x" * 300, "One."),
        ("One. Two! Three? " + "x" * 300, "One. Two! Three?"),
        ("3.14 is no end " + "x" * 300, "3.14 is no end…"),
        ("一。二。" + "三" * 300, "一。二。"),
        ("x" * 300, "x" * 199 + "…"),
        ("x" * 199 + ". y" + "y" * 300, "x" * 199 + "."),
        ("x" * 200, "x" * 200),
        ("word " * 100, "word " * 39 + "word…"),
    ],
)
def test_as_many_whole_sentences_as_fit_into_200_characters(text: str, kept: str) -> None:
    """Or the beginning of the first one, up to the end of a word."""
    assert lines({"role": "user", "content": text}) == [f"user: {kept}"]
    assert len(kept) <= 200


def test_first_and_newest_lines_stay_when_not_all_fit() -> None:
    """A line between them counts what was left out, through every step."""
    messages = [user(f"message {number}, {'x' * 30}") for number in range(100)]
    summary = roll_forward(None, messages, 1_024).split("\n")
    assert summary[:4] == [f"user: message {n}, {'x' * 30}" for n in range(4)]
    newest = summary[5:]
    assert newest == [f"user: message {n}, {'x' * 30}" for n in range(100 - len(newest), 100)]
    assert summary[4] == f"[{100 - 4 - len(newest)} left out]"
    assert len(newest) > 10


def test_text_of_another_author_stays_in_place_of_the_first_lines() -> None:
    """A model's or the application's: whole at first, and within half of the limit."""
    foreign = "The user wants a refund.\nThe assistant has asked for the order number."
    first = roll_forward(foreign, [user("It is 4711.")], 1_024)
    assert first == f"{foreign}\n[0 left out]\nuser: It is 4711."
    much = roll_forward(first, [user("x" * 100)] * 50, 1_024)
    assert much.startswith(f"{foreign}\n[")
    assert roll_forward("y" * 5_000, [user("hi")], 1_024) == f"{'y' * 512}\n[0 left out]\nuser: hi"


def test_conversation_without_words_has_a_summary_too() -> None:
    """So that the worker gets on; it leaves no trace in the next one."""
    nothing = roll_forward(None, [item({"type": "reasoning"})], 1_024)
    assert nothing == "(nothing was said)"
    assert roll_forward(nothing, [user("hi")], 1_024) == "user: hi"


_MESSAGES = st.lists(
    st.builds(
        lambda role, text: item({"role": role, "content": text}),
        st.sampled_from(["user", "assistant", "system"]),
        st.one_of(st.text(max_size=300), st.sampled_from(["x" * 90, "[3 left out]", "Yes. No. " * 40])),
    ),
    max_size=30,
)


@given(st.lists(_MESSAGES, max_size=5), st.integers(512, 2_048))
def test_steps_make_no_difference(parts: list[list[Item]], most: int) -> None:
    """Rolled forward part by part it is the text of all items at once; and the same every time."""
    at_once = roll_forward(None, [message for part in parts for message in part], most)
    rolled: str | None = None
    for part in parts:
        rolled = roll_forward(rolled, part, most)
    assert rolled == at_once or not parts


# Anything in the places where items of the two shapes have what is looked at.
_ODD_ITEMS = st.dictionaries(
    st.sampled_from(["role", "type", "content", "tool_calls", "call_id", "name", "output", "summary"]),
    st.sampled_from(["user", "assistant", "function_call", "message"])
    | json_values(st.sampled_from(["text", "type", "function", "name", "output_text", "\ud800", "\x00"])),
).map(item)


@given(
    st.none() | st.text(max_size=3_000),
    _MESSAGES | st.lists(_ODD_ITEMS, max_size=8),
    st.integers(512, 2_048),
)
def test_every_text_is_one_that_can_be_kept(previous: str | None, items: list[Item], most: int) -> None:
    """Never empty, never over the limit, encodable, whatever the items and the text before it are."""
    text = roll_forward(previous and encodable(previous), items, most)
    assert text.strip()
    assert len(text.encode()) <= most
    assert "\x00" not in text
    for line in items:
        said(line)


@given(st.text(), st.integers(0, 50))
def test_cut_text_is_the_longest_beginning_that_fits(text: str, most: int) -> None:
    """In bytes of UTF-8, and no half characters."""
    cut = cut_to_bytes(text := encodable(text), most)
    assert text.startswith(cut)
    assert len(cut.encode()) <= most
    assert cut == text or len(text[: len(cut) + 1].encode()) > most


async def test_it_says_who_it_is() -> None:
    """``made_by`` of its summaries."""
    summarizer = Extractive(1_024)
    assert summarizer.name == "extractive"
    assert await summarizer.summarize(None, [user("hi")]) == "user: hi"
