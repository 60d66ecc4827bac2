"""Items as lines of text for a summarizer, and texts within their bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from buffer.errors import InvalidRequest, TooLarge
from buffer.model.messages import to_messages

# NUL has no place in a Postgres text, a lone surrogate none in UTF-8.
_UNENCODABLE = re.compile("[\x00\ud800-\udfff]")


class Said(NamedTuple):
    """Who said what: ``text`` is empty where there is none; ``calls`` names the tools that were called."""

    role: str
    text: str
    calls: tuple[str, ...] = ()


def said(item: Mapping[str, Any]) -> Said | None:
    """An item of either shape as text; None for one that says nothing (reasoning, an unknown type)."""
    for message in to_messages([item]):
        role = message.get("role")
        text, calls = _text(message.get("content")), _calls(message.get("tool_calls"))
        if isinstance(role, str) and (text or calls):
            return Said(role, text, calls)
    return None


def _text(content: Any) -> str:
    if isinstance(content, str):
        return encodable(content)
    if not isinstance(content, list):
        return ""
    texts = (part.get("text") for part in content if isinstance(part, Mapping))
    return encodable("\n".join(text for text in texts if isinstance(text, str)))


def _calls(calls: Any) -> tuple[str, ...]:
    if not isinstance(calls, list):
        return ()
    functions = (call.get("function") for call in calls if isinstance(call, Mapping))
    names = (function.get("name") for function in functions if isinstance(function, Mapping))
    return tuple(encodable(name) for name in names if isinstance(name, str) and name)


def encodable(text: str) -> str:
    """The text with U+FFFD in place of what Postgres cannot hold."""
    return _UNENCODABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def cut_to_bytes(text: str, most_bytes: int) -> str:
    """The beginning of a text that fits into so many bytes of UTF-8."""
    encoded = text.encode()
    return text if len(encoded) <= most_bytes else encoded[:most_bytes].decode(errors="ignore")


def check_text(text: object, most_bytes: int) -> str:
    """The text of an application's summary.

    Raises:
        InvalidRequest: not a string, empty, or it holds what Postgres cannot hold.
        TooLarge: longer than ``most_bytes``.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"text must be a string, not {type(text).__name__}", param="text")
    if not text.strip():
        raise InvalidRequest("text must not be empty", param="text")
    if _UNENCODABLE.search(text):
        raise InvalidRequest("text holds U+0000 or a lone surrogate, which it must not", param="text")
    nbytes = len(text.encode())
    if nbytes > most_bytes:
        raise TooLarge(f"text is {nbytes} bytes; the limit is {most_bytes} (summary_max_bytes)", param="text")
    return text
