"""A write-behind buffer for chat conversations: acked from Redis Streams, flushed into Postgres."""

from __future__ import annotations

from buffer.app import Buffer, Conversation
from buffer.errors import (
    BufferError,
    Conflict,
    EmbeddedError,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    PostgresUnavailable,
    PreconditionFailed,
    RedisUnavailable,
    SchemaMismatch,
    SettingsError,
    SlowListener,
    TooLarge,
    Unavailable,
)
from buffer.model.types import (
    Context,
    ConversationInfo,
    ConversationPage,
    Event,
    Item,
    Page,
    Receipt,
    Summary,
)
from buffer.settings import Settings
from buffer.summaries.summarizer import Summarizer
from buffer.version import __version__

__all__ = [
    "Buffer",
    "BufferError",
    "Conflict",
    "Context",
    "Conversation",
    "ConversationInfo",
    "ConversationPage",
    "EmbeddedError",
    "Event",
    "InvalidRequest",
    "Item",
    "NotFound",
    "OutcomeUnknown",
    "Overloaded",
    "Page",
    "PostgresUnavailable",
    "PreconditionFailed",
    "Receipt",
    "RedisUnavailable",
    "SchemaMismatch",
    "Settings",
    "SettingsError",
    "SlowListener",
    "Summarizer",
    "Summary",
    "TooLarge",
    "Unavailable",
    "__version__",
]
