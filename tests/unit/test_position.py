"""Positions: epoch and sequence in 63 bits, in an order that never turns back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from buffer.model.position import (
    IMPORT_EPOCH,
    MAX_EPOCH,
    MAX_POSITION,
    MAX_SEQUENCE,
    SEQUENCE_BITS,
    epoch_of,
    pack,
    sequence_of,
)

epochs = st.integers(0, MAX_EPOCH) | st.sampled_from([0, 1, 2, MAX_EPOCH])
sequences = st.integers(0, MAX_SEQUENCE) | st.sampled_from([0, 1, MAX_SEQUENCE])


@given(epochs, sequences)
def test_epoch_and_sequence_come_back_from_a_position(epoch: int, sequence: int) -> None:
    """Packing loses nothing, at both ends of both ranges too."""
    position = pack(epoch, sequence)
    assert (epoch_of(position), sequence_of(position)) == (epoch, sequence)


@given(st.integers(0, MAX_POSITION))
def test_every_position_is_that_of_one_entry(position: int) -> None:
    """Any 63-bit number is a position, and of one epoch and sequence only."""
    assert pack(epoch_of(position), sequence_of(position)) == position


@given(st.tuples(epochs, sequences), st.tuples(epochs, sequences))
def test_positions_sort_by_epoch_and_then_by_sequence(one: tuple[int, int], other: tuple[int, int]) -> None:
    """A later epoch sorts after everything of an earlier one, and equal positions are the same entry."""
    assert (pack(*one) < pack(*other)) == (one < other)
    assert (pack(*one) == pack(*other)) == (one == other)


@given(epochs, sequences)
def test_positions_fit_a_signed_64_bit_column(epoch: int, sequence: int) -> None:
    """Postgres's bigint holds every position, and none is negative."""
    assert 0 <= pack(epoch, sequence) <= MAX_POSITION


def test_the_last_position_is_the_last_of_63_bits() -> None:
    """The limits of epoch and sequence together are the limit of a position: a stored format."""
    assert (SEQUENCE_BITS, MAX_SEQUENCE, MAX_EPOCH) == (40, 1_099_511_627_775, 8_388_607)
    assert pack(MAX_EPOCH, MAX_SEQUENCE) == MAX_POSITION == 2**63 - 1
    assert pack(1, 0) == 1_099_511_627_776


@given(epochs)
def test_sequence_minus_one_stands_before_the_first_entry_and_after_all_older_epochs(epoch: int) -> None:
    """A mark of -1 covers no entry of its epoch, and every entry of the epochs before."""
    before_first = pack(epoch, -1)
    assert before_first == pack(epoch, 0) - 1
    assert before_first >= pack(epoch - 1, MAX_SEQUENCE)
    # The packed form names the older epoch: who needs the epoch of such a mark must carry it beside.
    assert (epoch_of(before_first), sequence_of(before_first)) == (epoch - 1, MAX_SEQUENCE)


@given(sequences, epochs.filter(bool), sequences)
def test_imported_history_comes_before_whatever_was_appended(
    imported: int, epoch: int, appended: int
) -> None:
    """Epoch 0 is older than every epoch in which an append can happen."""
    assert pack(IMPORT_EPOCH, imported) < pack(epoch, appended)
