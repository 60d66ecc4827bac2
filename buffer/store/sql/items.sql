-- Items and conversations. A read also returns how far the shard is flushed, in the same snapshot.

-- name: newest
-- The newest items between two positions, newest first. One row of NULLs where there are none.
-- $1 tenant, $2 conversation, $3 after, $4 before (excluded), $5 limit, $6 shard, $7 $8 $9 removals that
-- are not flushed yet (after, before, by which item), $10 ids that are not flushed yet; `known` tells which
-- of them are stored: what came before its flush, or a repeat, which removes nothing. The summary's text is
-- in the first row only
select s.flushed_through, i.position, i.item_id, i.created_at, i.data,
    array(
        select item_id from buffer.items
        where tenant = $1 and conversation = $2 and item_id = any($10::text[])
    ) as known,
    exists (select from buffer.dead_letters where tenant = $1 and conversation = $2)
        or exists (select from buffer.missing m where m.shard = s.shard) as incomplete,
    s.path_epoch, s.mode,
    greatest(
        (select max(position) from buffer.items
         where tenant = $1 and conversation = $2 and data is not null),
        (select max(position) from buffer.removals where tenant = $1 and conversation = $2)
    ) as last_position,
    m.through as summary_through, m.made_by as summary_made_by, m.created_at as summary_created_at,
    case when row_number() over (order by i.position desc) = 1 then m.text end as summary_text
from buffer.shards s
left join lateral (
    select through, text, made_by, created_at from buffer.summaries
    where tenant = $1 and conversation = $2
    order by through desc
    limit 1
) m on true
left join lateral (
    select position, item_id, created_at, data
    from buffer.items
    where tenant = $1 and conversation = $2 and position > $3 and position < $4 and data is not null
      and not exists (
        select from unnest($7::bigint[], $8::bigint[], $9::text[]) as removal (after, before, by_id)
        where position > removal.after and position < removal.before
          and not exists (
            select from buffer.items
            where tenant = $1 and conversation = $2 and item_id = removal.by_id
          )
      )
    order by position desc
    limit $5
) i on true
where s.shard = $6
order by i.position desc

-- name: oldest
-- The oldest items between two positions, oldest first. One row of NULLs where there are none.
-- Parameters as above.
select s.flushed_through, i.position, i.item_id, i.created_at, i.data,
    array(
        select item_id from buffer.items
        where tenant = $1 and conversation = $2 and item_id = any($10::text[])
    ) as known,
    exists (select from buffer.dead_letters where tenant = $1 and conversation = $2)
        or exists (select from buffer.missing m where m.shard = s.shard) as incomplete,
    s.path_epoch, s.mode,
    greatest(
        (select max(position) from buffer.items
         where tenant = $1 and conversation = $2 and data is not null),
        (select max(position) from buffer.removals where tenant = $1 and conversation = $2)
    ) as last_position
from buffer.shards s
left join lateral (
    select position, item_id, created_at, data
    from buffer.items
    where tenant = $1 and conversation = $2 and position > $3 and position < $4 and data is not null
      and not exists (
        select from unnest($7::bigint[], $8::bigint[], $9::text[]) as removal (after, before, by_id)
        where position > removal.after and position < removal.before
          and not exists (
            select from buffer.items
            where tenant = $1 and conversation = $2 and item_id = removal.by_id
          )
      )
    order by position
    limit $5
) i on true
where s.shard = $6
order by i.position

-- name: snapshot
-- What a view holds: the newest items, newest first, the first one if it is short, and as above. One row of
-- NULLs where there are no items. `looked_at` counts the items up to one more than could be wanted.
-- $1 tenant, $2 conversation, $3 shard, $4 ids that are not flushed yet, $5 items that are needed whatever
-- their size, $6 most items, $7 most bytes
select s.flushed_through, i.position, i.item_id, i.created_at, i.data, i.looked_at,
    f.position as first_position, f.item_id as first_id, f.created_at as first_created_at,
    f.data as first_data,
    array(
        select item_id from buffer.items
        where tenant = $1 and conversation = $2 and item_id = any($4::text[])
    ) as known,
    exists (select from buffer.dead_letters where tenant = $1 and conversation = $2)
        or exists (select from buffer.missing m where m.shard = s.shard) as incomplete,
    s.path_epoch, s.mode,
    greatest(
        (select max(position) from buffer.items
         where tenant = $1 and conversation = $2 and data is not null),
        (select max(position) from buffer.removals where tenant = $1 and conversation = $2)
    ) as last_position,
    m.through as summary_through, m.made_by as summary_made_by, m.created_at as summary_created_at,
    case when row_number() over (order by i.position desc) = 1 then m.text end as summary_text
from buffer.shards s
left join lateral (
    select through, text, made_by, created_at from buffer.summaries
    where tenant = $1 and conversation = $2
    order by through desc
    limit 1
) m on true
left join lateral (
    select newest.*, row_number() over rows as n, count(*) over () as looked_at,
        sum(pg_column_size(data)) over rows as bytes
    from (
        select position, item_id, created_at, data
        from buffer.items
        where tenant = $1 and conversation = $2 and data is not null
        order by position desc
        limit greatest($5::int, $6::int) + 1
    ) newest
    window rows as (order by position desc)
) i on i.n <= $5 or (i.n <= $6 and i.bytes <= $7)
left join lateral (
    select position, item_id, created_at, data
    from buffer.items
    where tenant = $1 and conversation = $2 and data is not null
    order by position
    limit 1
) f on i.n = 1 and pg_column_size(f.data) <= 8192
where s.shard = $3
order by i.position desc

-- name: last_position
-- The last position of a conversation, removed items included: what removed them came after them.
-- $1 tenant, $2 conversation
select greatest(
    (select max(position) from buffer.items where tenant = $1 and conversation = $2 and data is not null),
    (select max(position) from buffer.removals where tenant = $1 and conversation = $2)
)

-- name: was_removed
-- Whether the deletion or erasure at a position has happened.
-- $1 tenant, $2 conversation, $3 position
select exists (
    select from buffer.removals where tenant = $1 and conversation = $2 and position = $3
) or exists (
    select from buffer.tombstones where tenant = $1 and conversation = $2 and through >= $3
)

-- name: positions
-- Where items of a conversation stand. $1 tenant, $2 conversation, $3 item ids
select item_id, position, data is null as removed from buffer.items
where tenant = $1 and conversation = $2 and item_id = any($3::text[])

-- name: present
-- What is stored under these ids.
-- $1 tenants, $2 conversations, $3 item ids
select i.tenant, i.conversation, i.item_id, i.position, i.data
from unnest($1::text[], $2::text[], $3::text[]) as wanted (tenant, conversation, item_id)
join buffer.items i using (tenant, conversation, item_id)

-- name: add_conversations
-- Those that have a user move up in its list, too. Returns what is new, and whatever has a user.
-- $1 tenants, $2 conversations, $3 users, $4 times of the first items, $5 times of the last ones
insert into buffer.conversations as c (tenant, conversation, user_id, created_at, active_at)
select * from unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::timestamptz[])
order by 1, 2
on conflict (tenant, conversation) do update
set user_id = coalesce(c.user_id, excluded.user_id), active_at = greatest(c.active_at, excluded.active_at)
where coalesce(c.user_id, excluded.user_id) is not null
returning tenant, conversation, xmax = 0 as added, user_id is not null as has_user

-- name: move_up
-- Conversations that have a user, in its list. $1 tenants, $2 conversations, $3 times of their last items, in ms
update buffer.conversations c set active_at = greatest(c.active_at, to_timestamp(a.at / 1000.0))
from unnest($1::text[], $2::text[], $3::bigint[]) as a (tenant, conversation, at)
where c.tenant = a.tenant and c.conversation = a.conversation
