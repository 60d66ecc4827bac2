"""The keys of a shard. All share one hash tag, so that one script may touch them and one node holds them."""

from __future__ import annotations


class ShardKeys:
    """Names of one shard's keys, as bytes.

    ===============================  ======  ====================================================
    key                              type    holds
    ===============================  ======  ====================================================
    ``buffer:{3}:stream``            stream  every unflushed item, once, in order
    ``buffer:{3}:state``             hash    the grant's epoch, flushed-through mark, bytes
    ``buffer:{3}:ids`` ``.old``      hash    idempotency window: id digest to body digest + sequence
    ``buffer:{3}:tail:acme/c7``      list    sequences of a conversation's unflushed items
    ``buffer:{3}:lease:acme/c7``     string  token of whoever looks the conversation up in Postgres
    ===============================  ======  ====================================================

    None but the lease has a TTL: an eviction policy of ``volatile-*`` cannot touch them.
    """

    __slots__ = ("_prefix", "ids", "ids_old", "state", "stream")

    def __init__(self, prefix: str, shard: int) -> None:
        self._prefix = f"{prefix}:{{{shard}}}:".encode()
        self.stream = self._prefix + b"stream"
        self.state = self._prefix + b"state"
        self.ids = self._prefix + b"ids"
        self.ids_old = self._prefix + b"ids.old"

    def tail(self, conversation_key: str) -> bytes:
        """The conversation's list of unflushed sequences."""
        return self._prefix + b"tail:" + conversation_key.encode()

    def lease(self, conversation_key: str) -> bytes:
        """The conversation's look-up lease."""
        return self._prefix + b"lease:" + conversation_key.encode()


def channel(prefix: str, name: str) -> bytes:
    """A pub/sub channel: ``flushed`` (settled marks) or ``nudge`` (someone waits for a flush)."""
    return f"{prefix}:{name}".encode()
