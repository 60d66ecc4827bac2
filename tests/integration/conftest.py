from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from buffer import Buffer, Settings
from tests.support.completions import Endpoint, endpoint
from tests.support.summaries import with_model


@pytest.fixture
async def patient(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer whose flusher flushes only when it is asked to."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=True) as buffer:
        yield buffer


@pytest.fixture
async def model() -> AsyncIterator[Endpoint]:
    """An endpoint of a model."""
    async with endpoint() as made:
        yield made


@pytest.fixture
def asking(settings: Settings, model: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with that endpoint as summarizer, and quick retries."""
    monkeypatch.setattr("buffer.summaries.worker._RETRY_MOST_SECONDS", 0.2)
    monkeypatch.setattr("buffer.summaries.worker._POLL_SECONDS", 0.1)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return with_model(settings, model)
