"""What of a conversation goes into a prompt: the newest items that fit, cut where models accept a cut. Pure.

Items are in chat-completions shape (``role``, ``tool_calls``, ``tool_call_id``) or in Conversations shape
(``type``, ``call_id``); both may be mixed. A cut keeps everything from one item on, and is possible where

* no tool call is cut off from a result of it that is kept, and no result stands first without its call;
* no reasoning item is cut off from the item after it, since a model takes them only together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

Item = Mapping[str, Any]
# Tokens of one item, or of a summary, which comes as {"role": "system", "content": text}.
TokenCounter = Callable[[Item], int]

_BYTES_A_TOKEN = 4
_TOKENS_A_MESSAGE = 4
_NOT_TEXT = {"id", "type", "role", "status"}

_encode = msgspec.json.Encoder().encode


def estimate_tokens(item: Item) -> int:
    """A quarter of the bytes of the item's text and arguments, and 4 for the message around them.

    English text takes 4 to 5 bytes a token with today's tokenizers, code and other languages 2 to 4, so it
    errs towards too many for most, and is no replacement for a tokenizer where the limit is hard.
    """
    nbytes = sum(len(_encode(value)) for key, value in item.items() if key not in _NOT_TEXT)
    return _TOKENS_A_MESSAGE + -(-nbytes // _BYTES_A_TOKEN)


def tiktoken_counter(model: str) -> TokenCounter:
    """Counts with tiktoken, if it is installed, as ``model`` would.

    Raises:
        ImportError: tiktoken is not installed.
        KeyError: tiktoken does not know the model.
    """
    import tiktoken  # noqa: PLC0415 - optional

    encoding = tiktoken.encoding_for_model(model)

    def count(item: Item) -> int:
        values = (value for key, value in item.items() if key not in _NOT_TEXT)
        texts = (value if isinstance(value, str) else _encode(value).decode() for value in values)
        return _TOKENS_A_MESSAGE + sum(len(encoding.encode(text, disallowed_special=())) for text in texts)

    return count


@dataclass(slots=True, frozen=True)
class Selection:
    """Items ``[first:]`` are kept; ``pinned`` says whether item 0 is kept besides them.

    ``over``: even the fewest items that may stand alone are more than the budget. ``summary``: whether there
    is room for the summary, too.
    """

    first: int
    pinned: bool = False
    over: bool = False
    summary: bool = True


def possible_cuts(items: Sequence[Item]) -> list[int]:
    """Indexes at which a prompt may begin, ascending; the last one is ``len(items)``."""
    called_at: dict[str, int] = {}
    # For each item, the earliest item that must be kept with it.
    needs = list(range(len(items)))
    orphans = set()
    for index, item in enumerate(items):
        for call in _calls(item):
            called_at.setdefault(call, index)
        answered = _answers(item)
        if answered is not None:
            if answered in called_at:
                needs[index] = called_at[answered]
            else:
                orphans.add(index)
        if index and _is_reasoning(items[index - 1]):
            needs[index] = min(needs[index], index - 1)
    cuts = [len(items)]
    earliest = len(items)
    for index in range(len(items) - 1, -1, -1):
        earliest = min(earliest, needs[index])
        if earliest >= index and index not in orphans:
            cuts.append(index)
    return cuts[::-1]


def select(
    items: Sequence[Item],
    *,
    turns: int,
    tokens: int | None,
    summary_tokens: int = 0,
    count: TokenCounter = estimate_tokens,
    pin_system: bool = False,
) -> Selection:
    """The longest end of ``items`` that is within ``turns`` items and ``tokens`` tokens.

    The summary and a pinned item count, too. If nothing fits beside the summary, the summary is left out: the
    newest items matter more. If nothing fits even so, it is the shortest end that may stand alone.
    """
    if not items:
        return Selection(0, summary=tokens is None or summary_tokens <= tokens)
    if tokens is None and len(items) <= turns and _answers(items[0]) is None:
        return Selection(0)  # all of them
    pinnable = pin_system and is_system(items[0])
    pinned_tokens = count(items[0]) if pinnable and tokens is not None else 0
    cuts = possible_cuts(items)[:-1] or [0]
    room = True
    if tokens is not None and summary_tokens:
        least = sum(count(item) for item in items[cuts[-1] :]) + (pinnable and cuts[-1] > 0) * pinned_tokens
        room = summary_tokens + least <= tokens
    best: int | None = None
    used, counted = summary_tokens * room, len(items)
    for first in reversed(cuts):
        pinned = pinnable and first > 0
        if tokens is not None:
            used += sum(count(item) for item in items[first:counted])
            counted = first
            if used + pinned * pinned_tokens > tokens:
                break
        if len(items) - first + pinned > turns:
            break
        best = first
    first = cuts[-1] if best is None else best
    return Selection(first, pinned=pinnable and first > 0, over=best is None, summary=room)


def _calls(item: Item) -> list[str]:
    """The tool calls that an item makes, by id."""
    if str(item.get("type", "")).endswith("_call") and isinstance(item.get("call_id"), str):
        return [item["call_id"]]
    calls = item.get("tool_calls")
    if not isinstance(calls, list):
        return []
    return [call["id"] for call in calls if isinstance(call, Mapping) and isinstance(call.get("id"), str)]


def _answers(item: Item) -> str | None:
    """The call that an item is the result of."""
    if str(item.get("type", "")).endswith("_call_output"):
        answered = item.get("call_id")
    elif item.get("role") == "tool":
        answered = item.get("tool_call_id")
    else:
        return None
    return answered if isinstance(answered, str) else ""


def _is_reasoning(item: Item) -> bool:
    return item.get("type") == "reasoning"


def is_system(item: Item) -> bool:
    """Whether an item is an instruction to the model."""
    return item.get("role") in {"system", "developer"}
