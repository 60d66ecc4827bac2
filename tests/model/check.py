"""The invariants: what the contract promises, checked against what clients saw and what is left."""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.redis_server import Entry
from tests.model.schedule import Host
from tests.model.world import Ack, Read, World


def violations(world: World) -> list[str]:
    """Everything that is wrong with how a healed schedule ended."""
    return list(dict.fromkeys(_all(world)))


def _all(world: World) -> Iterator[str]:
    _, _, final = world.postgres.read()
    acks = [ack for ack in world.history.acks if not _set_aside(world, ack)]
    yield from world.postgres.broken
    yield from _acked_items(world, acks, final)
    yield from _order(world, acks, final)
    for read in world.history.reads:
        if read.complete:
            yield from _complete_read(world, acks, read, final)


def _may_be_lost(world: World, item_id: str, host: Host) -> bool:
    """The one exception: the process that held the copy died, and so did the Redis data."""
    if item_id not in world.history.destroyed:
        return False
    kept = any(letter.item_id == item_id for letter in world.postgres.dead_letters)
    return host.killed or (kept and host.name in world.postgres.written_off)


def _taken_again(world: World, entry: Entry, host: Host) -> bool:
    """Its id was used anew while the only one who knew of it was missing."""
    return host.name in world.postgres.ever_missing and entry.item_id in world.postgres.items


def _excused(world: World, entry: Entry, host: Host) -> bool:
    return _may_be_lost(world, entry.item_id, host) or _taken_again(world, entry, host)


def _set_aside(world: World, ack: Ack) -> bool:
    """Its id was taken again while its holder was missing: it is a dead letter, or lost with its holder."""
    stored = world.postgres.items.get(ack.item_id)
    if stored in (None, (ack.position, ack.body)) or ack.host.name not in world.postgres.ever_missing:
        return False
    letters = world.postgres.dead_letters
    if any((letter.item_id, letter.body) == (ack.item_id, ack.body) for letter in letters):
        return True
    return _may_be_lost(world, ack.item_id, ack.host)


def _acked_items(world: World, acks: list[Ack], final: list[Entry]) -> Iterator[str]:
    """Nothing acked is lost; positions are final; one body per id; If-Match holds."""
    stored = {entry.item_id: entry for entry in final}
    for item_id in world.history.rejected:
        if item_id in stored:
            yield f"REJECTED: {item_id} is there all the same"
    first: dict[str, Ack] = {}
    for ack in acks:
        if first.setdefault(ack.item_id, ack).body != ack.body:
            yield f"BODIES: two of {ack.item_id} are acked"
        entry = stored.get(ack.item_id)
        if entry is None:
            if not _may_be_lost(world, ack.item_id, ack.host):
                yield f"LOST: {ack.item_id}"
            continue
        if entry.body != ack.body:
            yield f"BODIES: {ack.item_id} has another body than was acked"
        if entry.position != ack.position:
            yield f"POSITION: {ack.item_id} acked at {tuple(ack.position)}, stored at {tuple(entry.position)}"
        if ack.if_match is not None and any(ack.if_match < e.position < entry.position for e in final):
            yield f"IF-MATCH: {ack.item_id} does not follow what it was to follow"


def _order(world: World, acks: list[Ack], final: list[Entry]) -> Iterator[str]:
    """What was sent after an ack stands after it."""
    place = {entry.item_id: i for i, entry in enumerate(final)}
    began = world.history.began
    for earlier in acks:
        for later in acks:
            first, second = place.get(earlier.item_id, -1), place.get(later.item_id, len(place))
            if earlier.at < began[later.item_id] and first > second:
                yield f"ORDER: {earlier.item_id} was acked before {later.item_id} was sent"


def _complete_read(world: World, acks: list[Ack], read: Read, final: list[Entry]) -> Iterator[str]:
    """A complete read has all that was acked before, and is a prefix of every later one."""
    shown = [entry.item_id for entry in read.items]
    for ack in acks:
        missed = ack.at < read.began and ack.item_id not in shown
        if missed and not _may_be_lost(world, ack.item_id, ack.host):
            yield f"STALE: a read at {read.began} misses {ack.item_id}, acked at {ack.at}"
    kept = [entry for entry in read.items if entry in final or not _excused(world, entry, read.host)]
    if kept != final[: len(kept)]:
        yield f"PREFIX: a read at {read.began} by {read.host.name} showed {shown}"
