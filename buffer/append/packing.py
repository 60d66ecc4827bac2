"""How operations become one call of the append script."""

from __future__ import annotations

from collections.abc import Sequence

from buffer.append.operation import Operation
from buffer.model.position import epoch_of, sequence_of
from buffer.stream import scripts
from buffer.stream.keys import ShardKeys
from buffer.stream.link import Command, script_call


def append_call(keys: ShardKeys, member: bytes, epoch: int, operations: Sequence[Operation]) -> Command:
    """The script call that appends these operations to a shard; see ``scripts/append.lua``."""
    arguments = [b"%d" % epoch, member]
    for operation in operations:
        count = len(operation.arguments) >> 2
        arguments += (operation.conversation, b"1" if count == 1 else b"%d" % count)
        position = operation.expected
        if position is None:
            arguments.append(b"")
        elif epoch_of(position) == epoch:
            arguments += (b"%d" % sequence_of(position), operation.token)
        else:
            arguments += (b"-", operation.token)
        arguments += operation.arguments
    names = (keys.stream, keys.shard, keys.ids, keys.ids_old, keys.leases)
    return script_call(scripts.APPEND, names, arguments)
