"""An async context manager held open by a thread with an event loop of its own.

pytest-asyncio gives every test a new loop; what outlives a test must not depend on any of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


class Held(Generic[_T]):
    """Enter it from synchronous code; `value` is what the manager gave."""

    value: _T

    def __init__(self, manager: AbstractAsyncContextManager[_T]) -> None:
        self._manager = manager
        self._thread = ThreadPoolExecutor(1, "held")
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        try:
            self.value = self.run(self._manager.__aenter__())
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self._manager.__aexit__(None, None, None))
        finally:
            self._close()

    def run(self, coroutine: Coroutine[Any, Any, _R]) -> _R:
        """Run a coroutine in the thread's loop and wait for it."""
        return self._thread.submit(self._runner.run, coroutine).result()

    def _close(self) -> None:
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()
