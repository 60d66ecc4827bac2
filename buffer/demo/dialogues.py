"""Made-up support dialogues, so that the demo's items look like what a chat backend appends."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

_OPENINGS = [
    "Hi, my order {order} has not arrived yet.",
    "Can I change the delivery address of order {order}?",
    "I was charged twice for order {order}.",
    "The coffee grinder from order {order} is missing its lid.",
]
_REPLIES = [
    "I'm sorry about that. Let me look up order {order}.",
    "Sure, one moment while I check order {order}.",
    "Thanks for waiting. Order {order} left our warehouse on Tuesday and is due tomorrow.",
    "I have changed it. Anything else that I can do?",
    "I have refunded the second charge; it takes two to three days to show.",
]
_FOLLOW_UPS = [
    "Thanks!",
    "And when will that be?",
    "Could you send me a confirmation?",
    "Perfect, that's all 🙂",
]


def dialogue(seed: int) -> Iterator[dict[str, Any]]:
    """An endless dialogue, the same for the same seed: messages, tool calls and their results."""
    rng = random.Random(seed)
    order = rng.randrange(10_000, 99_999)
    yield _message("user", rng.choice(_OPENINGS).format(order=order))
    for turn in range(1_000_000):
        if rng.random() < 0.3:
            call_id = f"call_{seed}_{turn}"
            arguments = json.dumps({"order_id": order, "fields": ["status", "carrier"]})
            yield {"type": "function_call", "call_id": call_id, "name": "get_order", "arguments": arguments}
            output = json.dumps({"order_id": order, "status": rng.choice(["packed", "shipped", "delivered"])})
            yield {"type": "function_call_output", "call_id": call_id, "output": output}
        yield _message("assistant", rng.choice(_REPLIES).format(order=order))
        yield _message("user", rng.choice(_FOLLOW_UPS))


def _message(role: str, text: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}
