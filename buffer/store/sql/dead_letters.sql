-- Items that could not be stored.

-- name: add
-- Not what was removed or erased meanwhile. Returns which were new.
-- $1 tenants, $2 conversations, $3 item ids, $4 positions, $5 payloads, $6 reasons
insert into buffer.dead_letters (tenant, conversation, item_id, position, payload, reason)
select * from unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bytea[], $6::text[])
    as l (tenant, conversation, item_id, position, payload, reason)
where not exists (
    select from buffer.tombstones t
    where t.tenant = l.tenant and t.conversation = l.conversation and t.through >= l.position
) and not exists (
    select from buffer.removals r
    where r.tenant = l.tenant and r.conversation = l.conversation
      and r.position > l.position and r.after < l.position and r.before > l.position
)
on conflict do nothing
returning tenant, conversation, item_id

-- name: page
-- Oldest first. $1 after this number, $2 limit, $3 tenant or null, $4 conversation or null
select id, tenant, conversation, item_id, position, payload, reason, created_at
from buffer.dead_letters
where id > $1 and ($3::text is null or tenant = $3) and ($4::text is null or conversation = $4)
order by id
limit $2

-- name: get
-- $1 number. Locked, so that two retries do not meet.
select id, tenant, conversation, item_id, position, payload, reason, created_at
from buffer.dead_letters where id = $1 for update

-- name: drop
-- $1 number
delete from buffer.dead_letters where id = $1 returning id

-- name: count
select count(*) from buffer.dead_letters

-- name: store
-- At its own position; nothing if the id is taken. What was replaced in the meantime is stored as removed.
-- $1 tenant, $2 conversation, $3 position, $4 item id, $5 time, $6 payload
insert into buffer.items (tenant, conversation, position, item_id, created_at, data)
select $1::text, $2::text, $3::bigint, $4::text, $5::timestamptz, case when not exists (
    select from buffer.removals r
    where r.tenant = $1 and r.conversation = $2 and r.position > $3 and r.after < $3 and r.before > $3
) then convert_from($6::bytea, 'UTF8')::json end
on conflict (tenant, conversation, item_id) do nothing
returning position

-- name: holders
-- $1 tenants, $2 conversations
select distinct tenant, conversation from buffer.dead_letters
join unnest($1::text[], $2::text[]) as wanted (tenant, conversation) using (tenant, conversation)
