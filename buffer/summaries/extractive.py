"""A summarizer without a model: it picks sentences, always the same ones.

What it keeps, one line an item:

* of each message of a user or an assistant, as many whole sentences from its beginning as fit into 200
  characters; of a longer first sentence its beginning, up to the end of a word, and an ellipsis;
* the names of the tools that an assistant calls, up to 200 characters.

What it does not keep: system and developer messages (`context(pin_system=True)` does), arguments and results
of tools, reasoning, images, line breaks.

When the lines do not fit into the limit any more, the first four stay (as far as they fit into a quarter of
it), and the newest that fit; a line between them says how many were left out. A text of another summarizer,
or of the application, stays in place of the first lines, cut to half of the limit.

Rolled forward in parts it gives the same text as from all items at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from buffer.model.types import Item
from buffer.summaries.text import cut_to_bytes, said

_LINE_CHARACTERS = 200
_FIRST_LINES = 4
_NOTHING = "(nothing was said)"
_NOT_TEXT = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SENTENCE_END = re.compile(r"[.!?](?= |$)|[\u3002\uff01\uff1f]")
_LEFT_OUT = re.compile(r"\[(\d{1,15}) left out\]")
_OURS = re.compile(r"(?:user|assistant): \S.*")
# The longest line that says how many were left out, with its line break.
_LEFT_OUT_BYTES = len("[] left out\n") + 15 + 1


class Extractive:
    """Sentences from the conversation itself, at most ``max_bytes`` bytes of UTF-8. See this module."""

    name: ClassVar[str] = "extractive"

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    async def summarize(self, previous: str | None, items: Sequence[Item]) -> str:
        """See `Summarizer`."""
        return roll_forward(previous, items, self._max_bytes)


@dataclass(slots=True)
class _Text:
    """A text of ours, taken apart. Without a gap ``first`` is empty, and ``newest`` has all lines."""

    first: str
    left_out: int | None
    newest: list[str]


def roll_forward(previous: str | None, items: Iterable[Item], max_bytes: int) -> str:
    """What `Extractive` gives. Pure."""
    text = _take_apart(previous, max_bytes)
    text.newest += [line for item in items if (line := _line(item))]
    if text.left_out is None:
        whole = "\n".join(text.newest)
        if len(whole.encode()) <= max_bytes:
            return whole or _NOTHING
        first = _first_lines(text.newest, max_bytes // 4)
        text = _Text("\n".join(first), 0, text.newest[len(first) :])
    return _put_together(text, max_bytes)


def _take_apart(previous: str | None, max_bytes: int) -> _Text:
    if not previous or previous == _NOTHING:
        return _Text("", None, [])
    lines = previous.split("\n")
    for at in range(len(lines) - 1, -1, -1):
        if gap := _LEFT_OUT.fullmatch(lines[at]):
            first = "\n".join(lines[:at])
            return _Text(cut_to_bytes(first, max_bytes // 2), int(gap[1]), lines[at + 1 :])
    if all(_OURS.fullmatch(line) for line in lines):
        return _Text("", None, lines)
    return _Text(cut_to_bytes(previous, max_bytes // 2), 0, [])


def _put_together(text: _Text, max_bytes: int) -> str:
    room = max_bytes - len(text.first.encode()) - _LEFT_OUT_BYTES
    kept: list[str] = []
    for line in reversed(text.newest):
        room -= len(line.encode()) + 1
        if room < 0:
            break
        kept.append(line)
    left_out = (text.left_out or 0) + len(text.newest) - len(kept)
    first = [text.first] if text.first else []
    return "\n".join([*first, f"[{left_out} left out]", *reversed(kept)])


def _first_lines(lines: Sequence[str], most_bytes: int) -> list[str]:
    taken: list[str] = []
    for line in lines[:_FIRST_LINES]:
        most_bytes -= len(line.encode()) + 1
        if most_bytes < 0:
            break
        taken.append(line)
    return taken


def _line(item: Item) -> str | None:
    it = said(item)
    if it is None or it.role not in {"user", "assistant"}:
        return None
    calls = f"[calls {_one_line(', '.join(it.calls))[:_LINE_CHARACTERS]}]" if it.calls else ""
    parts = [part for part in (_beginning(_one_line(it.text)), calls) if part]
    return f"{it.role}: {' '.join(parts)}" if parts else None


def _one_line(text: str) -> str:
    return _NOT_TEXT.sub(" ", text.lstrip()[: 20 * _LINE_CHARACTERS]).strip()


def _beginning(text: str) -> str:
    """Whole sentences, or the beginning of the first one."""
    if len(text) <= _LINE_CHARACTERS:
        return text
    start = text[: _LINE_CHARACTERS + 1]
    ends = [match.end() for match in _SENTENCE_END.finditer(start) if match.end() <= _LINE_CHARACTERS]
    if ends:
        return start[: ends[-1]]
    words = start[:_LINE_CHARACTERS].rpartition(" ")[0] or start[: _LINE_CHARACTERS - 1]
    return f"{words.rstrip()}…"
