-- What is removed, and what is erased.

-- name: lock_conversations
-- Whoever removes, erases or summarizes waits here for the others, and for an import.
-- $1 tenants, $2 conversations
select from buffer.conversations c
where (tenant, conversation) in (select * from unnest($1::text[], $2::text[]))
order by tenant, conversation
for update

-- name: make_conversations
-- Where there is no row, an import may be about to make one: then this waits for it, and the row is locked.
-- $1 tenants, $2 conversations
insert into buffer.conversations (tenant, conversation, created_at)
select tenant, conversation, now() from unnest($1::text[], $2::text[]) as c (tenant, conversation)
order by 1, 2
on conflict do nothing

-- name: add_removals
-- What was removed is kept in mind for rows that a spill brings later.
-- Not one from before an erasure: there is nothing left for it to remove.
-- $1 tenants, $2 conversations, $3 positions of the removals, $4 after, $5 before, $6 deleted ids.
-- Returns which were new.
insert into buffer.removals (tenant, conversation, position, after, before, item_id)
select * from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::text[])
    as r (tenant, conversation, position, after, before, item_id)
where not exists (
    select from buffer.tombstones t
    where t.tenant = r.tenant and t.conversation = r.conversation and t.through >= r.position
)
on conflict do nothing
returning position

-- name: remove_letters
-- $1 tenants, $2 conversations, $3 after, $4 before
delete from buffer.dead_letters l
using unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) as cut (tenant, conversation, after, before)
where l.tenant = cut.tenant and l.conversation = cut.conversation
  and l.position > cut.after and l.position < cut.before

-- name: remove_items
-- Removed items keep their row, so that their id is never used again.
-- $1 tenants, $2 conversations, $3 after, $4 before
update buffer.items i set data = null
from unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) as cut (tenant, conversation, after, before)
where i.tenant = cut.tenant and i.conversation = cut.conversation
  and i.position > cut.after and i.position < cut.before and i.data is not null

-- name: remove_summaries
-- Those that may hold what is removed. A statement after the lock: it sees what was written meanwhile.
-- $1 tenants, $2 conversations, $3 after
delete from buffer.summaries s
using unnest($1::text[], $2::text[], $3::bigint[]) as cut (tenant, conversation, after)
where s.tenant = cut.tenant and s.conversation = cut.conversation and s.through > cut.after

-- name: add_tombstones
-- $1 tenants, $2 conversations, $3 positions. Returns which were new.
insert into buffer.tombstones as t (tenant, conversation, through)
select * from unnest($1::text[], $2::text[], $3::bigint[])
order by 1, 2
on conflict (tenant, conversation) do update
set through = excluded.through, erased_at = excluded.erased_at
where t.through < excluded.through
returning tenant, conversation, through

-- name: erase_items
-- $1 tenants, $2 conversations, $3 positions. Returns how many of each.
with erased as (
    delete from buffer.items i
    using unnest($1::text[], $2::text[], $3::bigint[]) as e (tenant, conversation, through)
    where i.tenant = e.tenant and i.conversation = e.conversation and i.position <= e.through
    returning i.tenant, i.conversation
)
select tenant, conversation, count(*) as items from erased group by 1, 2

-- name: erase_removals
-- $1 tenants, $2 conversations, $3 positions
delete from buffer.removals r
using unnest($1::text[], $2::text[], $3::bigint[]) as e (tenant, conversation, through)
where r.tenant = e.tenant and r.conversation = e.conversation and r.position <= e.through

-- name: erase_summaries
-- $1 tenants, $2 conversations, $3 positions
delete from buffer.summaries s
using unnest($1::text[], $2::text[], $3::bigint[]) as e (tenant, conversation, through)
where s.tenant = e.tenant and s.conversation = e.conversation and s.through <= e.through

-- name: erase_letters
-- $1 tenants, $2 conversations, $3 positions
delete from buffer.dead_letters l
using unnest($1::text[], $2::text[], $3::bigint[]) as e (tenant, conversation, through)
where l.tenant = e.tenant and l.conversation = e.conversation and l.position <= e.through

-- name: erase_conversations
-- Not where newer items are there already: a spill may bring an erasure late.
-- $1 tenants, $2 conversations, $3 positions
delete from buffer.conversations c
using unnest($1::text[], $2::text[], $3::bigint[]) as e (tenant, conversation, through)
where c.tenant = e.tenant and c.conversation = e.conversation
  and not exists (
    select from buffer.items i
    where i.tenant = e.tenant and i.conversation = e.conversation and i.position > e.through
  )

-- name: add_user_tombstone
-- $1 tenant, $2 user
insert into buffer.user_tombstones (tenant, user_id) values ($1, $2)
on conflict (tenant, user_id) do update set erased_at = excluded.erased_at

-- name: user_conversations
-- $1 tenant, $2 user, $3 after, $4 limit
select conversation from buffer.conversations
where tenant = $1 and user_id = $2 and conversation > $3
order by conversation
limit $4
