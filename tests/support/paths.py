"""Waiting for the path of all shards to be somewhere."""

from __future__ import annotations

from buffer import Buffer
from tests.support.polling import eventually


def modes(buffer: Buffer) -> set[str]:
    """Where this process appends to at this moment."""
    return {str(state.mode) for state in buffer.runtime.member.states}


async def on_path(buffer: Buffer, mode: str, *, seconds: float = 15.0) -> None:
    """Return once every shard's path is ``mode`` for this process."""
    await eventually(lambda: modes(buffer) == {mode}, seconds=seconds)
