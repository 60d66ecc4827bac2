"""Conversations whose items are numbered, and waiting for their summaries."""

from __future__ import annotations

from buffer import Buffer, Conversation, Settings, Summary
from tests.support.completions import Endpoint
from tests.support.polling import eventually

EVERY, KEEP = 10, 5


def with_model(settings: Settings, model: Endpoint, **more: object) -> Settings:
    update = {
        "summarizer": "openai",
        "summarizer_base_url": model.url,
        "summarizer_model": "m-1",
        "summary_every_items": EVERY,
        "summary_keep_items": KEEP,
        "flush_interval_seconds": 0.02,
        **more,
    }
    return settings.model_copy(update=update)


async def fill(conversation: Conversation, first: int, last: int) -> list[int]:
    """Append items numbered so, in batches; their positions."""
    bodies = [{"role": "user", "content": f"n={number}"} for number in range(first, last)]
    positions = []
    for at in range(0, len(bodies), 100):
        batch = bodies[at : at + 100]
        ids = [f"m-{body['content'][2:]}" for body in batch]
        positions += [r.position for r in await conversation.extend(batch, ids=ids)]
    return positions


async def summary_through(conversation: Conversation, position: int) -> Summary:
    """The summary, once it goes that far."""

    async def look() -> Summary | None:
        summary = (await conversation.context(1)).summary
        return summary if summary and summary.through >= position else None

    return await eventually(look)


def outcomes(buffer: Buffer, outcome: str) -> float:
    labels = {"outcome": outcome}
    return buffer.runtime.metrics.registry.get_sample_value("buffer_summaries_total", labels) or 0
