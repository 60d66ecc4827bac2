"""The path protocol: for each shard, appends go to Redis, or to Postgres, and never to both.

A store that is alive for some and dead for others, clocks that differ, an old primary that wakes up, a Redis
that comes back with older data: each of these breaks order or completeness if processes choose where to
write by themselves. So the path is a fact in Postgres, in the shard's row::

              Redis is lost: no grant, another server,         every process has confirmed the epoch,
              or out of reach for redis_lost_seconds           or was silent for a heartbeat time-out
    ┌──────────┐  epoch + 1   ┌───────────┐                    and is missing    ┌──────────┐
    │  stream  │ ───────────► │  closing  │ ───────────────────────────────────► │  direct  │
    └──────────┘              └───────────┘                                      └──────────┘
         ▲                     processes spill                                        │
         │    epoch + 1        what they retain                                       │
         └────────────────────────────────────────────────────────────────────────────┘
              a Redis was fenced, what it held salvaged, and nobody is missing any more;
              then the grant of the new epoch empties it

An accepting process (`member.Member`), for each shard::

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

Every flusher is a manager of the path (`manager.Manager`): it watches Redis, closes, opens, and goes back.

What makes it safe, and what breaks without each rule, is in ``tests/model``: the same protocol as a model,
in which every rule can be switched off. The rules in short:

* Scripts refuse a caller of another epoch, or who is not a member. Connections lead to the server that the
  row names by its run id, or are not used.
* A process **retains** what it acked, or showed to a reader from the tail, until a mark of the same epoch
  passes it (`retention.Retention`). It acks only while it knows that nobody can have judged it dead: for a
  share of the heartbeat time-out after a heartbeat, or while all managers say that they are without Postgres
  too.
* No clock is compared with another host's. Managers judge a heartbeat by how long they themselves saw it
  stand still; questions and answers about Postgres being away are numbered.
"""
