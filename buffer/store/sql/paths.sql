-- The path of each shard, and the registry of those who use it. Who locks more than one row locks shards
-- first, in their order, then processes, then managers.

-- name: heartbeat
-- A process says that it lives, and looks at the path. No row of it: `confirmed` is NULL.
-- $1 process
with beat as (
    update buffer.processes set beats = beats + 1, heartbeat_at = now() where process = $1
    returning confirmed
)
select s.shard, s.path_epoch, s.mode, s.run_id,
    not exists (select from buffer.missing m where m.shard = s.shard) as clean,
    greatest(0, extract(epoch from s.ids_known_at - now()))::float8 as ids_unknown_seconds,
    (select confirmed from beat) as confirmed
from buffer.shards s order by s.shard

-- name: lock
-- $1 shards
select shard, path_epoch, mode, next_direct, flushed_through
from buffer.shards where shard = any($1::int[]) order by shard for update

-- name: registration
-- $1 process
select confirmed from buffer.processes where process = $1 for update

-- name: register
-- $1 process, $2 confirmed
insert into buffer.processes (process, confirmed) values ($1, $2)
on conflict (process) do update
set confirmed = excluded.confirmed, beats = processes.beats + 1, heartbeat_at = now()

-- name: missing_in
-- $1 names under which a process may be missing, $2 shards
select shard from buffer.missing where process = any($1::text[]) and shard = any($2::int[])

-- name: found
-- $1 process, $2 shards
delete from buffer.missing where process = $1 and shard = any($2::int[])

-- name: is_clean
select not exists (select from buffer.missing)

-- name: leave
-- $1 process
delete from buffer.processes where process = $1

-- name: count_spilled
-- $1 shard, $2 how many were new, $3 the last position
update buffer.shards set spilled_turns = spilled_turns + $2, placed_turns = placed_turns + $2,
    last_seen = greatest(last_seen, $3)
where shard = $1

-- name: count_salvaged
-- $1 shard, $2 how many were new, $3 the last position
update buffer.shards set salvaged_turns = salvaged_turns + $2, placed_turns = placed_turns + $2,
    last_seen = greatest(last_seen, $3)
where shard = $1

-- name: count_direct
-- $1 shards, $2 how many
update buffer.shards s set next_direct = next_direct + n.turns, direct_turns = direct_turns + n.turns
from unnest($1::int[], $2::bigint[]) as n (shard, turns) where s.shard = n.shard

-- name: look
-- A manager looks. `again`: it was known before. $1 manager, $2 how many seconds ago it saw Redis, or NULL
insert into buffer.path_managers (manager, redis_seen_at)
values ($1, coalesce(now() - make_interval(secs => $2::float8), '-infinity'))
on conflict (manager) do update
set looks = path_managers.looks + 1, looked_at = now(),
    redis_seen_at = greatest(path_managers.redis_seen_at, excluded.redis_seen_at)
returning (xmax <> 0) as again, now() as looked_at

-- name: paths
select s.shard, s.path_epoch, s.mode, s.run_id, s.fence_mark, s.flushed_through,
    not exists (select from buffer.missing m where m.shard = s.shard) as clean
from buffer.shards s order by s.shard

-- name: processes
select process, beats, confirmed from buffer.processes

-- name: managers
select manager, looks from buffer.path_managers

-- name: may_judge
-- A manager may act on its judgement while it is registered, and not long after it looked.
-- $1 manager, $2 when it looked, $3 for how many seconds that counts
select manager from buffer.path_managers
where manager = $1 and clock_timestamp() - $2::timestamptz <= make_interval(secs => $3::float8)
for update

-- name: dismiss
-- A manager that was not seen for long. $1 manager, $2 its number of looks
delete from buffer.path_managers where manager = $1 and looks = $2 returning manager

-- name: resign
-- $1 manager
delete from buffer.path_managers where manager = $1

-- name: others_see_redis
-- $1 manager, $2 seconds
select exists (
    select from buffer.path_managers
    where manager <> $1 and redis_seen_at > now() - make_interval(secs => $2::float8)
)

-- name: close
-- $1 shards, $2 the epochs that were seen, $3 the last positions that are known to have been given out
update buffer.shards s
set path_epoch = s.path_epoch + 1, mode = 'closing', placed_turns = 0,
    last_seen = greatest(s.flushed_through, (s.path_epoch << 40) - 1, seen.last)
from unnest($1::int[], $2::bigint[], $3::bigint[]) as seen (shard, path_epoch, last)
where s.shard = seen.shard and s.path_epoch = seen.path_epoch and s.mode = 'stream'
returning s.shard

-- name: catch_up
-- Redis holds a grant that this Postgres does not know. $1 shard, $2 the epoch of the grant, $3 run id
update buffer.shards set path_epoch = $2::bigint + 1, mode = 'closing', run_id = $3, placed_turns = 0,
    flushed_through = greatest(flushed_through, ($2::bigint << 40) - 1), last_seen = ($2::bigint << 40) - 1
where shard = $1

-- name: go_on_after
-- $1 shard, $2 the last number that counts as taken
update buffer.shards set next_direct = greatest(next_direct, $2::bigint + 1) where shard = $1

-- name: mark_flushed
-- $1 shard, $2 position
update buffer.shards set flushed_through = $2 where shard = $1

-- name: late
-- Who is registered, and has not confirmed. Locked, since what it confirmed elsewhere is written back.
-- $1 shards
select s.shard, p.process, p.beats, p.confirmed
from buffer.shards s join buffer.processes p on p.confirmed[s.shard + 1] < s.path_epoch
where s.shard = any($1::int[])
order by s.shard, p.process
for update of p

-- name: set_confirmed
-- $1 process, $2 confirmed
update buffer.processes set confirmed = $2 where process = $1

-- name: add_missing
-- $1 shard, $2 process
insert into buffer.missing (shard, process) values ($1, $2) on conflict do nothing

-- name: open_direct
-- $1 shards
update buffer.shards set mode = 'direct', next_direct = 0 where shard = any($1::int[])

-- name: missing
-- $1 shards
select m.shard, m.process, extract(epoch from now() - m.since)::float8 as seconds,
    greatest(s.flushed_through, ((s.path_epoch - 1) << 40) - 1) as through, s.last_seen, s.placed_turns
from buffer.missing m join buffer.shards s using (shard) where m.shard = any($1::int[])

-- name: forget_missing
-- $1 shard, $2 process
delete from buffer.missing where shard = $1 and process = $2

-- name: open_stream
-- Ids of what was stored elsewhere within the window are not known to Redis; of a shard that was never
-- used there are none. $1 shards, $2 run id, $3 fences, $4 idempotency window in seconds
update buffer.shards s
set mode = 'stream', path_epoch = s.path_epoch + 1, run_id = $2, fence_mark = f.mark,
    ids_known_at = case when s.path_epoch = 1 and s.direct_turns = 0 then '-infinity'::timestamptz
                        else now() + make_interval(secs => $4::float8) end
from unnest($1::int[], $3::text[]) as f (shard, mark)
where s.shard = f.shard
returning s.shard, s.path_epoch

-- name: add_loss
-- $1 shard, $2 kind, $3 turns, $4 first position, $5 last position, $6 detail
insert into buffer.losses (shard, kind, turns, first_position, last_position, detail)
values ($1, $2, $3, $4, $5, $6)

-- name: add_incarnation
-- $1 store, $2 detail
insert into buffer.incarnations (store, detail) values ($1, $2)

-- name: audit
select (select coalesce(sum(turns), 0) from buffer.losses)::bigint as lost_turns,
    (select count(*) from buffer.incarnations where store = 'redis') as redis_incarnations,
    (select count(*) from buffer.incarnations where store = 'postgres') as postgres_incarnations,
    (select count(*) from buffer.dead_letters) as dead_letters,
    (select count(distinct process) from buffer.missing) as missing,
    (select count(*) from buffer.processes) as processes,
    (select coalesce(sum(flushed_turns), 0) from buffer.shards)::bigint as flushed_turns,
    (select coalesce(sum(direct_turns), 0) from buffer.shards)::bigint as direct_turns,
    (select coalesce(sum(spilled_turns), 0) from buffer.shards)::bigint as spilled_turns,
    (select coalesce(sum(salvaged_turns), 0) from buffer.shards)::bigint as salvaged_turns

-- name: losses
-- Newest first. $1 limit
select shard, kind, turns, first_position, last_position, detail, at
from buffer.losses order by id desc limit $1

-- name: incarnations
-- Newest first. $1 limit
select store, detail, at from buffer.incarnations order by id desc limit $1
