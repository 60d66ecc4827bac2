-- Shards: who flushes them, and how far. All times are Postgres's, so flushers' clocks do not matter.
-- Who waits for the locks of more than one row takes them in the order of the shards, see paths.sql.

-- name: status
select shard, path_epoch, mode, not exists (select from buffer.missing m where m.shard = s.shard) as clean,
    owner, fence, lease_until > now() as owned, flushed_through, flushed_turns, flushed_at
from buffer.shards s order by shard

-- name: heartbeat
-- $1 flusher, $2 seconds after which a silent flusher no longer counts. Returns how many others are live,
-- and how many of those come before this one by name.
with beat as (
    insert into buffer.flushers (flusher, heartbeat_at) values ($1, now())
    on conflict (flusher) do update set heartbeat_at = excluded.heartbeat_at
), gone as (
    delete from buffer.flushers where heartbeat_at < now() - make_interval(secs => 100 * $2::float8)
)
select count(*) as others, count(*) filter (where flusher < $1) as before
from buffer.flushers
where heartbeat_at > now() - make_interval(secs => $2::float8) and flusher <> $1

-- name: leave
-- $1 flusher
delete from buffer.flushers where flusher = $1

-- name: renew
-- Keep what is ours. $1 flusher, $2 lease in seconds. Rows that a flush holds locked renew themselves.
with ours as materialized (
    select shard from buffer.shards where owner = $1 order by shard for update
)
update buffer.shards s set lease_until = now() + make_interval(secs => $2::float8)
from ours where s.shard = ours.shard and s.owner = $1
returning s.shard, s.fence, s.path_epoch, s.flushed_through, s.mode

-- name: expired_owners
-- Owners whose lease ran out: whatever transaction they still hold open is ended before a takeover.
select distinct owner from buffer.shards where owner is not null and lease_until < now()

-- name: end_transactions
-- A stopped owner may hold locks in an open transaction. $1 application names
select pg_terminate_backend(pid) from pg_stat_activity
where application_name = any($1::text[]) and usename = current_user and pid <> pg_backend_pid()

-- name: claim
-- Take up to $3 shards that nobody holds. $1 flusher, $2 lease in seconds, $3 how many
update buffer.shards set owner = $1, fence = fence + 1, lease_until = now() + make_interval(secs => $2::float8)
where shard in (
    select shard from buffer.shards
    where owner is null or lease_until < now()
    order by random()
    limit $3
    for update skip locked
)
returning shard, fence, path_epoch, flushed_through, mode

-- name: release
-- $1 flusher, $2 shards
with ours as materialized (
    select shard from buffer.shards where owner = $1 and shard = any($2::int[]) order by shard for update
)
update buffer.shards s set owner = null, lease_until = '-infinity'
from ours where s.shard = ours.shard and s.owner = $1

-- name: advance
-- The fence: part of every flush. Fewer rows back than asked for means that somebody else owns a shard now.
-- $1 flusher, $2 lease in seconds, $3 shards, $4 fences, $5 path epochs, $6 flushed through, $7 turns
with ours as materialized (
    -- Not those that are closing: their locks are with a spill, which may wait for the rows of this flush.
    select shard from buffer.shards where owner = $1 and shard = any($3::int[]) and mode = 'stream'
    order by shard for update
)
update buffer.shards s
set flushed_through = batch.through, flushed_turns = s.flushed_turns + batch.turns, flushed_at = now(),
    lease_until = greatest(s.lease_until, now() + make_interval(secs => $2::float8))
from unnest($3::int[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
    as batch (shard, fence, path_epoch, through, turns)
    join ours using (shard)
where s.shard = batch.shard and s.owner = $1 and s.fence = batch.fence and s.path_epoch = batch.path_epoch
  and s.mode = 'stream'
returning s.shard
