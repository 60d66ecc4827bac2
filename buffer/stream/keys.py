"""The keys of a shard. All share one hash tag, so that one script may touch them and one node holds them."""

from __future__ import annotations


class ShardKeys:
    """Names of one shard's keys, as bytes.

    =========================  ======  =============================================================
    key                        type    holds
    =========================  ======  =============================================================
    ``buffer:{3}:stream``      stream  every unflushed item, once, in order; each entry names the one
                                       before it in its conversation
    ``buffer:{3}:shard``       hash    the grant's ``epoch``, the flushed-through ``mark``, ``bytes``;
                                       and for each ``tenant/conversation`` its last unflushed entry
    ``buffer:{3}:ids`` .old    hash    idempotency window: id digest to body digest and sequence
    ``buffer:{3}:leases``      hash    who looks a conversation up in Postgres
    =========================  ======  =============================================================

    None has a TTL: an eviction policy of ``volatile-*`` cannot touch them.
    """

    __slots__ = ("ids", "ids_old", "leases", "shard", "stream")

    def __init__(self, prefix: str, shard: int) -> None:
        tag = f"{prefix}:{{{shard}}}:".encode()
        self.stream = tag + b"stream"
        self.shard = tag + b"shard"
        self.ids = tag + b"ids"
        self.ids_old = tag + b"ids.old"
        self.leases = tag + b"leases"


def channel(prefix: str, name: str) -> bytes:
    """A pub/sub channel: ``flushed`` (settled marks) or ``nudge`` (someone waits for a flush)."""
    return f"{prefix}:{name}".encode()
