-- Conversations in bulk: what import must know before its COPY, and what export reads.

-- name: lock_conversations
-- Makes the rows that are missing and locks all of them, those that stay as they are included, in one order:
-- imports of the same conversations wait for each other here and nowhere else. Values that are set stay.
-- $1 tenants, $2 conversations, $3 users, $4 metadata, $5 times, $6 times of the last items
insert into buffer.conversations as c (tenant, conversation, user_id, metadata, created_at, active_at)
select * from unnest($1::text[], $2::text[], $3::text[], $4::json[], $5::timestamptz[], $6::timestamptz[])
order by 1, 2
on conflict (tenant, conversation) do update
set user_id = coalesce(c.user_id, excluded.user_id),
    metadata = coalesce(c.metadata, excluded.metadata),
    created_at = least(c.created_at, excluded.created_at),
    active_at = greatest(c.active_at, excluded.active_at)
where (c.user_id is null and excluded.user_id is not null)
   or (c.metadata is null and excluded.metadata is not null)
   or c.created_at > excluded.created_at
   or c.active_at < excluded.active_at

-- name: state
-- What the conversations hold, in the order of the parameters. `metadata` only where it is another text.
-- `erased`: imported positions are erased there. Its own statement, so that it sees an erasure for which the
-- lock waited. $1 tenants, $2 conversations, $3 metadata, $4 the first position that is not for imports
select c.user_id,
    case when c.metadata::text <> wanted.metadata::text then c.metadata end as metadata,
    exists (
        select from buffer.items i where i.tenant = c.tenant and i.conversation = c.conversation
    ) as has_items,
    coalesce((
        select i.position from buffer.items i
        where i.tenant = c.tenant and i.conversation = c.conversation and i.position < $4
        order by i.position desc
        limit 1
    ), 0) as last_imported,
    exists (
        select from buffer.tombstones t where t.tenant = c.tenant and t.conversation = c.conversation
    ) as erased
from unnest($1::text[], $2::text[], $3::json[]) with ordinality as wanted (tenant, conversation, metadata, n)
join buffer.conversations c using (tenant, conversation)
order by wanted.n

-- name: digests
-- Where ids are stored, and a digest of the body; NULL for a removed item.
-- $1 tenants, $2 conversations, $3 item ids
select i.tenant, i.conversation, i.item_id, i.position, sha256(convert_to(i.data::text, 'UTF8')) as digest
from unnest($1::text[], $2::text[], $3::text[]) as wanted (tenant, conversation, item_id)
join buffer.items i using (tenant, conversation, item_id)

-- name: drop_summaries
-- Made before items came to stand within them. What an application wrote stays.
-- $1 tenants, $2 conversations, $3 first positions of new items, $4 what an application's is made by
delete from buffer.summaries s
using unnest($1::text[], $2::text[], $3::bigint[]) as new (tenant, conversation, first)
where s.tenant = new.tenant and s.conversation = new.conversation and s.through > new.first and s.made_by <> $4

-- name: taken
-- Positions that are taken, from one on.
-- $1 tenant, $2 conversation, $3 from, $4 limit
select position from buffer.items
where tenant = $1 and conversation = $2 and position >= $3
order by position
limit $4

-- name: conversations
-- $1 tenant, $2 user; NULL: all
select tenant, conversation, user_id, metadata, created_at from buffer.conversations
where ($1::text is null or tenant = $1) and ($2::text is null or user_id = $2)
order by tenant, conversation

-- name: first_items
-- The first items of several conversations, at most $3 of each; `n` counts the conversations from 1.
-- $1 tenants, $2 conversations, $3 limit
select wanted.n, i.position, i.item_id, i.created_at, i.data
from unnest($1::text[], $2::text[]) with ordinality as wanted (tenant, conversation, n)
cross join lateral (
    select position, item_id, created_at, data from buffer.items
    where tenant = wanted.tenant and conversation = wanted.conversation and data is not null
    order by position
    limit $3
) i
order by wanted.n, i.position

-- name: next_items
-- $1 tenant, $2 conversation, $3 after, $4 limit
select position, item_id, created_at, data from buffer.items
where tenant = $1 and conversation = $2 and position > $3 and data is not null
order by position
limit $4
