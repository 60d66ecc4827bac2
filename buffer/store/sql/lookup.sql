-- Single items, and what happened in a conversation; each beside the tail, in the snapshot of its path.

-- name: item
-- One row: an item by its id, or NULLs, also where it was removed; `known`: which of the ids are stored.
-- $1 tenant, $2 conversation, $3 item id, $4 shard, $5 ids that are not flushed yet
select s.path_epoch, s.mode, s.flushed_through, i.position, i.item_id, i.created_at, i.data,
    array(
        select item_id from buffer.items
        where tenant = $1 and conversation = $2 and item_id = any($5::text[] || $3::text)
    ) as known,
    exists (select from buffer.dead_letters where tenant = $1 and conversation = $2)
        or exists (select from buffer.missing m where m.shard = s.shard) as incomplete
from buffer.shards s
left join buffer.items i
    on i.tenant = $1 and i.conversation = $2 and i.item_id = $3 and i.data is not null
where s.shard = $4

-- name: last
-- The last position at which anything happened. $1 tenant, $2 conversation, $3 shard
select s.path_epoch, s.mode, s.flushed_through, greatest(
    (select max(position) from buffer.items where tenant = $1 and conversation = $2 and data is not null),
    (select max(position) from buffer.removals where tenant = $1 and conversation = $2),
    (select through from buffer.tombstones where tenant = $1 and conversation = $2),
    0
) as last
from buffer.shards s where s.shard = $3

-- name: history
-- What happened after a position, oldest first; one row of NULLs where nothing did. An item that is there
-- is told as appended, with what it replaced; one that is gone only as far as it replaced others.
-- $1 tenant, $2 conversation, $3 after, $4 limit, $5 shard, $6 ids that are not flushed yet; `known`: which of
-- those are stored
select s.path_epoch, s.mode, s.flushed_through,
    not exists (select from buffer.missing m where m.shard = s.shard) as clean,
    array(
        select item_id from buffer.items
        where tenant = $1 and conversation = $2 and item_id = any($6::text[])
    ) as known,
    e.kind, e.position, e.item_id, e.removed_after, e.created_at, e.data
from buffer.shards s
left join lateral (
    (
        select 'i' as kind, i.position, i.item_id, r.after as removed_after, i.created_at, i.data
        from buffer.items i
        left join buffer.removals r using (tenant, conversation, position)
        where i.tenant = $1 and i.conversation = $2 and i.position > $3 and i.data is not null
        order by i.position
        limit $4
    )
    union all
    (
        select 'd', r.position, r.item_id, case when r.item_id is null then r.after end, null, null
        from buffer.removals r
        where r.tenant = $1 and r.conversation = $2 and r.position > $3 and not exists (
            select from buffer.items i
            where i.tenant = $1 and i.conversation = $2 and i.position = r.position and i.data is not null
        )
        order by r.position
        limit $4
    )
    union all
    select 'e', through, null, null, null, null
    from buffer.tombstones where tenant = $1 and conversation = $2 and through > $3
) e on true
where s.shard = $5
order by e.position
limit $4
