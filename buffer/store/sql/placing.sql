-- Placing: rows put at positions that they have already, where some may be there (spill, salvage, direct).
-- The caller holds the shard's row locked, so placements of a conversation never meet.

-- name: place
-- An item that was removed is stored as removed, one that was erased not at all. Returns which were new.
-- $1 tenants, $2 conversations, $3 positions, $4 item ids, $5 times, $6 data
insert into buffer.items (tenant, conversation, position, item_id, created_at, data)
select p.tenant, p.conversation, p.position, p.item_id, p.created_at,
    case when not exists (
        select from buffer.removals r
        where r.tenant = p.tenant and r.conversation = p.conversation
          and r.position > p.position and r.after < p.position and r.before > p.position
    ) then convert_from(p.data, 'UTF8')::json end
from unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::timestamptz[], $6::bytea[])
    as p (tenant, conversation, position, item_id, created_at, data)
where not exists (
    select from buffer.tombstones t
    where t.tenant = p.tenant and t.conversation = p.conversation and t.through >= p.position
)
order by p.tenant, p.conversation, p.position
on conflict on constraint items_identity do nothing
returning tenant, conversation, item_id

-- name: last_positions
-- The last position of conversations, removed items included. $1 tenants, $2 conversations
select w.tenant, w.conversation, i.position
from unnest($1::text[], $2::text[]) as w (tenant, conversation)
cross join lateral (
    select greatest(
        (select max(position) from buffer.items
         where tenant = w.tenant and conversation = w.conversation and data is not null),
        (select max(position) from buffer.removals
         where tenant = w.tenant and conversation = w.conversation)
    ) as position
) i
where i.position is not null
