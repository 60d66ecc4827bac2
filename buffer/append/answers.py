"""What follows from the append script's answers: what is retained, and what is counted."""

from __future__ import annotations

from buffer.append.operation import Operation
from buffer.metrics import Metrics
from buffer.path.retention import OVERHEAD_BYTES, Retention

_DIGITS = b"0123456789"
_DUPLICATE = ord("d")


def is_taken(answer: bytes) -> bool:
    """Whether Redis holds the operation's items: they were appended, or known already."""
    return answer[0] in _DIGITS or answer[0] == _DUPLICATE


def retain(
    retention: Retention, shard: int, epoch: int, operations: list[Operation], answers: list[bytes]
) -> None:
    """Keep what is acked; repeats, too: whoever acked them first may be dead."""
    kept = retention.epoch(shard, epoch)
    nbytes = turns = 0
    for operation, answer in zip(operations, answers, strict=True):
        if answer[0] in _DIGITS:
            count, sequence = len(operation.ids), int(answer)
            held = operation.nbytes + count * OVERHEAD_BYTES
            if served := kept.get(sequence):  # a reader was faster
                nbytes -= served[0]
                turns -= served[1]
            kept[sequence] = (held, count, operation.arguments)
            nbytes += held
            turns += count
        elif answer[0] == _DUPLICATE:
            for index, sequence in enumerate(map(int, answer[1:].split(b","))):
                arguments = operation.arguments[4 * index : 4 * index + 4]
                retention.keep(shard, epoch, sequence, 1, arguments, len(arguments[3]))
    retention.bytes += nbytes
    retention.turns += turns


def count(metrics: Metrics, operations: list[Operation], answers: list[bytes]) -> None:
    """Count items by how their append ended."""
    acked: dict[str, int] = {}
    for operation, answer in zip(operations, answers, strict=True):
        if answer[0] in _DIGITS:
            acked[operation.level] = acked.get(operation.level, 0) + len(operation.ids)
        elif answer[0] == _DUPLICATE:
            metrics.appends.inc(("stream", operation.level, "duplicate"), len(operation.ids))
    for level, items in acked.items():
        metrics.appends.inc(("stream", level, "acked"), items)
