"""What a failure in Postgres means for the rows that were being written."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["retry", "duplicate", "data", "hold"]


def classify_sqlstate(sqlstate: str) -> Verdict:
    """By SQLSTATE (PostgreSQL documentation, appendix A).

    * ``retry``: the connection, resources, an operator or a serialization conflict (08, 53, 57, 40, 55P03).
    * ``duplicate``: 23505, a row that is there already.
    * ``data``: 22 and the rest of 23, the row itself is at fault.
    * ``hold``: anything else, such as a missing table or permission: nobody's data is at fault, someone
      has to act, and until then nothing may be dropped.
    """
    if sqlstate == "23505":
        return "duplicate"
    if sqlstate[:2] in {"22", "23"}:
        return "data"
    if sqlstate[:2] in {"08", "53", "57", "40"} or sqlstate == "55P03":
        return "retry"
    return "hold"
