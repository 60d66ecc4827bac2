"""What a failure in Postgres means for the rows: try again, known already, at fault, or hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buffer.policy.failures import classify_sqlstate

RETRY = {
    "08000": "connection_exception",
    "08003": "connection_does_not_exist",
    "08006": "connection_failure",
    "08P01": "protocol_violation",
    "40001": "serialization_failure",
    "40P01": "deadlock_detected",
    "53000": "insufficient_resources",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55P03": "lock_not_available",
    "57014": "query_canceled",
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
}
DATA = {
    "22001": "string_data_right_truncation",
    "22003": "numeric_value_out_of_range",
    "22008": "datetime_field_overflow",
    "22021": "character_not_in_repertoire",
    "22P02": "invalid_text_representation",
    "22P05": "untranslatable_character",
    "23502": "not_null_violation",
    "23503": "foreign_key_violation",
    "23514": "check_violation",
    "23P01": "exclusion_violation",
}
HOLD = {
    "00000": "successful_completion",
    "25006": "read_only_sql_transaction",
    "25P02": "in_failed_sql_transaction",
    "28P01": "invalid_password",
    "3D000": "invalid_catalog_name",
    "3F000": "invalid_schema_name",
    "42501": "insufficient_privilege",
    "42601": "syntax_error",
    "42703": "undefined_column",
    "42P01": "undefined_table",
    "54000": "program_limit_exceeded",
    "55006": "object_in_use",
    "58030": "io_error",
    "XX000": "internal_error",
    "XX001": "data_corrupted",
    "": "no SQLSTATE",
}


@pytest.mark.parametrize("sqlstate", RETRY, ids=lambda code: f"{code}-{RETRY[code]}")
def test_what_passes_by_itself_is_retried(sqlstate: str) -> None:
    """Connections, resources, an operator, a serialization conflict: the same rows will do later."""
    assert classify_sqlstate(sqlstate) == "retry"


@pytest.mark.parametrize("sqlstate", DATA, ids=lambda code: f"{code}-{DATA[code]}")
def test_only_classes_22_and_23_put_a_row_at_fault(sqlstate: str) -> None:
    """The row itself cannot be stored, and no retry changes that."""
    assert classify_sqlstate(sqlstate) == "data"


@pytest.mark.parametrize("sqlstate", HOLD, ids=lambda code: f"{code or 'none'}-{HOLD[code]}")
def test_what_somebody_has_to_mend_holds_the_shard(sqlstate: str) -> None:
    """A missing table or permission is nobody's data: nothing may be dropped for it."""
    assert classify_sqlstate(sqlstate) == "hold"


def test_a_row_that_is_there_already_is_a_duplicate() -> None:
    """23505 alone: its class is otherwise the row's fault."""
    assert classify_sqlstate("23505") == "duplicate"


@given(
    st.text(st.sampled_from("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"), min_size=5, max_size=5)
    | st.text(max_size=6)
)
def test_an_unknown_failure_never_blames_the_row(sqlstate: str) -> None:
    """Whatever a later Postgres invents, a row is at fault only in classes 22 and 23."""
    verdict = classify_sqlstate(sqlstate)
    assert verdict in {"retry", "duplicate", "data", "hold"}
    assert (verdict in {"data", "duplicate"}) == sqlstate.startswith(("22", "23"))
