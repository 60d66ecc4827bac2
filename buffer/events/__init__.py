"""Live events of conversations: each once, in order, from every process.

A listener reads what happened (`buffer.read.history`) and goes over to what happens: entries of its shard's
stream, which one `follower.Follower` a shard and process reads as they come, while anybody listens there.
What makes this safe:

* A follower first asks which number was given out last. A listener that is told so **starts**: from then on
  it gets everything after that number, and what it reads of the history from then on has everything before.
* Numbers are dense within an epoch of the path. A number that is missing (flushed and trimmed before it was
  read), a connection that broke, a path that changed: the follower then **breaks off**, all listeners of
  the shard read the history again from their own last position, and start anew.
* An entry is told only under the rules for reads: Redis is this epoch's path, nobody can have judged this
  process dead, and it retains what it shows until that is in Postgres.
* A listener takes only what is after its last position; so it does not matter what it gets twice.

While the path is direct, listeners look into Postgres now and then.
"""
