"""Items as chat-completions messages, for models that are asked through that interface.

Source: the OpenAI API reference, "Create chat completion" and "Conversation items".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Message = dict[str, Any]

_TEXTS = {"input_text", "output_text", "text", "summary_text", "refusal"}


def to_messages(items: Iterable[Mapping[str, Any]], summary: str | None = None) -> list[Message]:
    """The items as messages, oldest first; a summary comes first, as a system message.

    Items that are messages already are kept as they are, without an ``id`` or ``status``. Tool calls that
    follow each other are one assistant message. What has no form here (reasoning, calls of hosted tools,
    types of a later release) is left out.
    """
    messages: list[Message] = []
    if summary:
        messages.append({"role": "system", "content": f"Summary of the conversation so far:\n{summary}"})
    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and isinstance(item.get("role"), str):
            messages.append(_message(item))
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": _content(item.get("output"))}
            )
    return messages


def _message(item: Mapping[str, Any]) -> Message:
    message = {key: value for key, value in item.items() if key not in {"id", "type", "status", "content"}}
    if "content" in item:
        message["content"] = _content(item["content"])
    return message


def _add_call(messages: list[Message], item: Mapping[str, Any]) -> None:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    last = messages[-1] if messages else None
    if last is not None and last["role"] == "assistant":
        calls = last.get("tool_calls")
        last["tool_calls"] = [*calls, call] if isinstance(calls, list) else [call]
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _content(content: Any) -> Any:
    """Text as one string; where there are images, a list of parts."""
    if not isinstance(content, list):
        return content
    parts = [_part(part) for part in content if isinstance(part, Mapping)]
    if all(part is not None and part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts if part)
    return [part for part in parts if part is not None]


def _part(part: Mapping[str, Any]) -> Message | None:
    kind = part.get("type")
    if isinstance(kind, str) and kind in _TEXTS:
        return {"type": "text", "text": str(part.get("text", part.get("refusal", "")))}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return dict(part) if kind == "image_url" else None
