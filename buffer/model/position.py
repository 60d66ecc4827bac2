"""A position is an item's place in its conversation: ``epoch << 40 | sequence``.

The epoch numbers the path (see `docs/architecture.md`); the sequence is counted by the shard's
stream, or by the shard's row in Postgres, densely within the epoch. Both only grow, so positions of
one conversation only grow. 63 bits hold 8 million epochs of a million million items a shard.

Positions are computed here and never in Lua, whose numbers are doubles.
"""

from __future__ import annotations

SEQUENCE_BITS = 40
MAX_SEQUENCE = (1 << SEQUENCE_BITS) - 1
MAX_EPOCH = (1 << 23) - 1
MAX_POSITION = (1 << 63) - 1

# Imported history lives in epoch 0, before everything that was ever appended.
IMPORT_EPOCH = 0


def pack(epoch: int, sequence: int) -> int:
    """The position of entry ``sequence`` of ``epoch``; sequence -1 is "before the first"."""
    return (epoch << SEQUENCE_BITS) + sequence


def epoch_of(position: int) -> int:
    """The path epoch that gave out this position."""
    return position >> SEQUENCE_BITS


def sequence_of(position: int) -> int:
    """The entry's number in its shard within the epoch, from 0."""
    return position & MAX_SEQUENCE
