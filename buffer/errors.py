"""Every error that this package raises, under one root.

Three families matter to a caller:

* `Unavailable`: nothing was stored; try again after ``retry_after`` seconds.
* `OutcomeUnknown`: it may have been stored; repeat it with the same ids, and it is stored once.
* the rest: the request itself is at fault, and repeating it unchanged will not help.
"""

from __future__ import annotations

from collections.abc import Sequence


class BufferError(Exception):
    """Root of all errors of this package."""


class SettingsError(BufferError):
    """A setting is missing or wrong; the message names it."""


class EmbeddedError(BufferError):
    """An embedded server could not be installed, started or stopped."""


class InvalidRequest(BufferError):
    """The request breaks a rule that the message names; nothing was stored.

    ``param`` names the field at fault, as in ``items[3].id``.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLarge(InvalidRequest):
    """An item, a batch or an id is over its limit; the message names the limit."""


class NotFound(BufferError):
    """The conversation or item does not exist for this tenant."""


class Conflict(BufferError):
    """An item id is known with another body, or only a part of a batch is known."""

    def __init__(self, message: str, *, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = list(ids)


class PreconditionFailed(BufferError):
    """``if_match`` did not name the conversation's last position, which is ``last_position``."""

    def __init__(self, message: str, *, last_position: int) -> None:
        super().__init__(message)
        self.last_position = last_position


class Unavailable(BufferError):
    """Nothing was stored; the same request may succeed after ``retry_after`` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """A bounded queue is full."""


class RedisUnavailable(Unavailable):
    """Redis did not answer, or refused for a reason that passes."""


class PostgresUnavailable(Unavailable):
    """Postgres did not answer, or refused for a reason that passes."""


class SchemaMismatch(BufferError):
    """The database does not carry the schema that this release needs; the message names the command."""


class OutcomeUnknown(BufferError):
    """The request may have taken effect; repeat it with the same ids, and it is stored once.

    ``level`` is the durability level that was reached for certain, or None.
    """

    def __init__(self, message: str, *, ids: Sequence[str], level: str | None = None) -> None:
        super().__init__(message)
        self.ids = list(ids)
        self.level = level


class SlowListener(BufferError):
    """A listener did not take events as fast as they came; resume after ``position``, and none is missed."""

    def __init__(self, message: str, *, position: int) -> None:
        super().__init__(message)
        self.position = position
