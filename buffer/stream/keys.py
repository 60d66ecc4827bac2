"""The keys of a shard. All share one hash tag, so that one script may touch them and one node holds them."""

from __future__ import annotations


class ShardKeys:
    """Names of one shard's keys, as bytes.

    =========================  ======  =============================================================
    key                        type    holds
    =========================  ======  =============================================================
    ``buffer:{3}:stream``      stream  every unflushed item, once, in order; each entry names the one
                                       before it in its conversation
    ``buffer:{3}:shard``       hash    the grant's ``epoch``, the flushed-through ``mark``, ``bytes``, the
                                       last erasure ``erased``; for each member ``@process``; for each
                                       ``tenant/conversation`` its last unflushed entry; or, without a
                                       grant, the ``fence``
    ``buffer:{3}:ids`` .old    hash    idempotency window: id digest to body digest and sequence; for each
                                       ``!tenant/conversation`` that was erased, where
    ``buffer:{3}:leases``      hash    who looks a conversation up in Postgres
    ``buffer:{3}:fills``       hash    who fills a conversation's view from Postgres
    ``buffer:{3}:managers``    hash    which of the processes' questions each path manager has answered
    ``buffer:{3}:view:...``    string  a conversation's view, see `buffer.stream.views`
    =========================  ======  =============================================================

    Only views have a TTL: an eviction policy of ``volatile-*`` cannot touch the rest.
    """

    __slots__ = ("_view", "all_views", "fills", "ids", "ids_old", "leases", "managers", "shard", "stream")

    def __init__(self, prefix: str, shard: int) -> None:
        tag = f"{prefix}:{{{shard}}}:".encode()
        self.stream = tag + b"stream"
        self.shard = tag + b"shard"
        self.ids = tag + b"ids"
        self.ids_old = tag + b"ids.old"
        self.leases = tag + b"leases"
        self.fills = tag + b"fills"
        self.managers = tag + b"managers"
        self._view = tag + b"view:"
        self.all_views = f"{prefix}:{{*}}:view:*".encode()  # a pattern: those of the other shards, too

    def view(self, epoch: int, conversation: bytes) -> bytes:
        """The key of a conversation's view in an epoch of the path."""
        return b"%b%d:%b" % (self._view, epoch, conversation)


def member_field(process: str) -> bytes:
    """The field of the shard's hash that makes a process a member of the grant; it holds no ``/``."""
    return b"@" + process.encode()


def channel(prefix: str, name: str) -> bytes:
    """A pub/sub channel: ``flushed`` (settled marks) or ``nudge`` (someone waits for a flush)."""
    return f"{prefix}:{name}".encode()
