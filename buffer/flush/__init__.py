"""From the streams into Postgres: one fenced owner a shard, acked and trimmed only after the commit."""
