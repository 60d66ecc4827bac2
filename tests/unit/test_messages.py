"""Items as chat-completions messages."""

from __future__ import annotations

from buffer import Context
from buffer.model.messages import to_messages
from buffer.model.types import Summary


def test_messages_are_kept_and_content_lists_become_text() -> None:
    """Both shapes of a message, images as parts, nothing that a model would refuse."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    items = [
        {"role": "system", "content": "be kind"},
        {"id": "msg_1", "type": "message", "role": "user", "status": "completed",
         "content": [{"type": "input_text", "text": "what is"}, {"type": "input_text", "text": "this?"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "see"}, image]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a cat"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]  # fmt: skip
    assert to_messages(items) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "what is\nthis?"},
        {"role": "user", "content": [
            {"type": "text", "text": "see"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "assistant", "content": "no"},
    ]  # fmt: skip


def test_tool_calls_become_one_assistant_message_and_results_tool_messages() -> None:
    """Parallel calls are one message; what has no form here is left out."""
    items = [
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "g", "arguments": '{"x":1}'},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "web_search_call", "id": "ws"},
        {"type": "of a later release"},
    ]
    assert to_messages(items) == [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": '{"x":1}'}}]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
    ]  # fmt: skip


def test_chat_completions_items_pass_unchanged() -> None:
    """Whoever stores that shape gets it back."""
    items = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": {}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}],
        },
    ]
    assert to_messages(items) == items


def test_odd_values_where_a_shape_has_others_break_nothing() -> None:
    """Items are the application's: a list for a type, null for calls."""
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    odd = {"role": "assistant", "content": [{"type": []}, {"type": "text", "text": "x"}], "tool_calls": None}
    (message,) = to_messages([odd, call])
    assert message["content"] == [{"type": "text", "text": "x"}]
    assert [made["id"] for made in message["tool_calls"]] == ["a"]


def test_summary_comes_first() -> None:
    """As a system message."""
    context = Context([], None, summary=Summary("they like tea", 7))
    (message,) = context.messages()
    assert message["role"] == "system"
    assert "they like tea" in message["content"]
