"""What makes a summary, and which one the settings choose."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from buffer.errors import BufferError
from buffer.model.types import Item
from buffer.settings import Settings


class SummaryFailed(BufferError):
    """A summarizer has no summary to give; it will be asked again later."""


class Summarizer(Protocol):
    """Makes summaries. It may be asked for several conversations at a time."""

    @property
    def name(self) -> str:
        """Kept with each summary as ``made_by``; a model's name, for example."""

    async def summarize(self, previous: str | None, items: Sequence[Item]) -> str:
        """A text that stands for everything that ``previous`` stands for, and for ``items``.

        ``items`` are consecutive, oldest first, and at least one. What is longer than ``summary_max_bytes``
        is cut. Any exception, an empty text, and more than ``summarizer_timeout_seconds`` count as a failure.
        It must not block the event loop.
        """


@asynccontextmanager
async def open_summarizer(settings: Settings) -> AsyncIterator[Summarizer | None]:
    """The summarizer of these settings, for as long as the context lasts; None if there is none."""
    # Imported late: most processes make no summaries.
    if settings.summarizer == "extractive":
        from buffer.summaries.extractive import Extractive  # noqa: PLC0415

        yield Extractive(settings.summary_max_bytes)
    elif settings.summarizer == "openai":
        from buffer.summaries.openai_compatible import OpenAICompatible  # noqa: PLC0415

        async with OpenAICompatible(
            settings.summarizer_base_url,
            settings.summarizer_model,
            settings.summarizer_api_key.get_secret_value(),
            timeout_seconds=settings.summarizer_timeout_seconds,
            max_bytes=settings.summary_max_bytes,
        ) as summarizer:
            yield summarizer
    else:
        yield None
