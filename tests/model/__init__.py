"""A random-schedule model of the path protocol: how one shard moves between Redis and Postgres.

No server runs here. Processes, flushers, clients and faults are generators that yield between any two
atomic steps; a seeded scheduler picks who goes on. Requests and replies get lost, arrive late or are done
after their caller gave up; Redis dies, is wiped, stands still, comes back older; Postgres goes away; hosts
are cut off, paused, killed. Then everything is mended, the shard must come to rest, and `check` compares
what clients were told with what there is. Every rule of the protocol is a member of `rules.Rule` and can be
switched off; for each of them a schedule is known that goes wrong without it (`test_model`).

The path of a shard is one row in Postgres::

              Redis is lost: no grant, another server,         every process has confirmed the epoch, or
              or out of reach for several tries                its heartbeat has run out: then it is missing
    ┌──────────┐  epoch + 1   ┌───────────┐                             ┌──────────┐
    │  stream  │ ───────────► │  closing  │ ──────────────────────────► │  direct  │
    └──────────┘              └───────────┘                             └──────────┘
         ▲                     processes spill                               │
         │    epoch + 1        what they retain                              │
         └───────────────────────────────────────────────────────────────────┘
              a Redis was fenced, what it held salvaged, and nobody is missing any more;
              then the grant of the new epoch empties it

An accepting process::

              the row says closing:               the row says direct:
              spill and confirm in one            nothing older is retained
    ┌──────────┐  transaction  ┌───────────┐                            ┌──────────┐
    │  stream  │ ────────────► │  closing  │ ─────────────────────────► │  direct  │
    └──────────┘               └───────────┘                            └──────────┘
       │    ▲                        │                                    │    │
       │    │ joined the grant,      │ not registered                     │    │ the row says stream
       │    │ whose epoch is the     ▼ any more                           │    │
       │    │ row's            ┌───────────┐                              │    │
       │    └───────────────── │  joining  │ ◄────────────────────────────┘────┘
       └─────────────────────► └───────────┘
         refused, or not         spill what is older by id, and register, in one transaction
         registered any more

Files: `redis_server` (what scripts do), `postgres` (what transactions do), `process`, `flusher`, `manager`
(the path's side of a flusher), `clients`, `faults`, `world` (calls and their fates), `schedule`, `check`
(invariants), `explore` (profiles and the command line).

    python -m tests.model --seeds 4000                        all profiles, all rules
    python -m tests.model --without SPILL_BARRIER             what one rule is for
    python -m tests.model --profile two --seed 7 --trace      one schedule, step by step if it fails

What the model leaves out: removals (pop, delete, erase), cached views, several shards and conversations,
the bytes of it all, and a clock that stands still in a host while it is cut off from Redis as well.
"""
