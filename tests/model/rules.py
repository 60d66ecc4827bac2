"""The protocol's rules, each of which can be switched off.

A rule's value says what holds with it. `test_model.py` shows for every one that without it some schedule
breaks an invariant; where the code asks ``if Rule.X in world.rules``, the other branch is what a plausible
implementation without the rule would do.
"""

from __future__ import annotations

from enum import Enum


class Rule(Enum):
    """What a correct implementation must do; the model's default is all of them."""

    # The grant in Redis
    GRANT_EPOCH = "a script refuses a caller of another epoch than the granted one"
    GRANT_MEMBER = "a script refuses a process that is not a member"
    GRANT_OVER_FENCE = "a grant counts only over the fence that was put up for it, so it counts once"
    RUN_ID = "a process uses only the server incarnation that the path row names"
    RUN_ID_MANAGER = "a flusher does, too"

    # What counts as an ack, and what is kept for it
    LATE_REPLY = "a reply that arrives after its epoch ended for the process is not an ack"
    PERMIT = "a process acks in stream mode only while it knows that nobody can have judged it dead"
    RETAIN_DUPLICATES = "an item that is answered as a duplicate is retained like a first one"
    RETAIN_SERVED = "tail items that a reader was shown are retained by the process that showed them"
    IDS_FIRST = "an id is looked for before If-Match is judged, also where Postgres knows the last position"
    MARK_EPOCH = "a flushed-through mark releases retained items of its own epoch only"
    LOOK_UP_IDS = "after a return, ids that Redis cannot know are looked up in Postgres before the append"

    # Closing
    CLOSE_COMPARES = "the path row changes by compare-and-set only"
    FLUSH_CHECKS_PATH = "a flush commits only if the row is in stream mode at the batch's epoch"
    SPILL_BARRIER = "direct begins when each registered process has confirmed or its heartbeat has run out"
    SPILL_CONFIRMS = "spill and confirmation are one transaction"
    ABSENT_IS_MISSING = "a process that did not confirm makes the shard unclean"
    JUDGE_PATIENTLY = "heartbeats are judged only by a manager that reached Postgres for a whole time-out"

    # Direct
    DIRECT_CHECKS_PATH = "a direct append commits only if the row is in direct mode at the process's epoch"
    DIRECT_NUMBERS = "a direct append takes its number under the row lock"
    DIRECT_ONCE = "a direct append looks for its id in the same transaction"
    IF_MATCH_CLEAN = "If-Match is refused where the last position may be unknown"
    READ_SNAPSHOT = "a direct read sees items and path row in one snapshot"
    COMPLETE_IF_CLEAN = "a read says complete only if the shard is clean"

    # Return
    SALVAGE_UNCLEAN = "where a process is missing, what the stream of the last epoch holds is inserted"
    SALVAGE_ONLY_UNCLEAN = "where nobody is missing, nothing is: what Postgres has not was never acked"
    SALVAGE_LAST_EPOCH = "nor is what an older server holds of an earlier epoch"
    GO_BACK_CLEAN = "the path goes back to the stream only when nobody is missing any more"
    CONFIRM_BEFORE_STREAM = "a process drops what it retained of older epochs only once it has confirmed"

    # Leaving and coming back
    KICK_FIRST = "a process is put out of the grant before it is unregistered"
    UNREGISTER_FLUSHED = "it is unregistered only when all that the stream held at the kick is flushed"
    WRITE_OFF_SALVAGED = "the missing are written off only after what the next Redis holds was salvaged"
    WRITTEN_OFF = (
        "what comes back after it was written off stays out of the order: reads were complete without it"
    )
    REJOIN_SPILLS = (
        "a process that was unregistered spills what it retained of older epochs before it goes on"
    )

    # Flush and read
    FLUSH_ONCE = "a flush inserts an id that is there already no second time"
    FLUSHED_THROUGH = "flushed-through is written in the transaction of the rows"
    SETTLE_COMPARES = "settle moves the mark only from where the flusher saw it"
    LEASE = "a last position from Postgres counts only under a lease that a settle ends"
    TAIL_FIRST = "a read takes the tail first, then Postgres"
    READ_CHECKS_PATH = "a stream read looks at the path row in the snapshot, and is repeated if that moved on"


ALL = frozenset(Rule)
