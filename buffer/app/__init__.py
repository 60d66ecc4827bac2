"""The public objects: a `Buffer` of this process, and its `Conversation`s."""

from buffer.app.buffer import Buffer
from buffer.app.conversation import Conversation

__all__ = ["Buffer", "Conversation"]
