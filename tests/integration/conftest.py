from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from buffer import Buffer, Settings


@pytest.fixture
async def patient(settings: Settings) -> AsyncIterator[Buffer]:
    """A buffer whose flusher flushes only when it is asked to."""
    slow = settings.model_copy(update={"flush_interval_seconds": 60.0})
    async with Buffer.connect(slow, flusher=True) as buffer:
        yield buffer
