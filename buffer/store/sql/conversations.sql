-- Conversations one at a time, and the list of a user's.

-- name: get
-- $1 tenant, $2 conversation
select conversation, user_id, metadata, created_at, active_at
from buffer.conversations where tenant = $1 and conversation = $2

-- name: create
-- No row back: there is one already. $1 tenant, $2 conversation, $3 user, $4 metadata
insert into buffer.conversations (tenant, conversation, user_id, metadata, created_at)
values ($1, $2, $3, $4::json, now())
on conflict do nothing
returning conversation, user_id, metadata, created_at, active_at

-- name: set_metadata
-- $1 tenant, $2 conversation, $3 metadata
update buffer.conversations set metadata = $3::json where tenant = $1 and conversation = $2
returning conversation, user_id, metadata, created_at, active_at

-- name: describe
-- The same for a conversation whose items are all unflushed, of which the first one tells the rest.
-- $1 tenant, $2 conversation, $3 metadata, $4 user, $5 $6 times of its first and last item
insert into buffer.conversations as c (tenant, conversation, metadata, user_id, created_at, active_at)
values ($1, $2, $3::json, $4, $5, $6)
on conflict (tenant, conversation) do update set metadata = excluded.metadata
returning conversation, user_id, metadata, created_at, active_at

-- name: still
-- The path of a shard, kept as it is until the transaction ends, and what was erased of a conversation.
-- $1 shard, $2 tenant, $3 conversation
select path_epoch, mode, not exists (select from buffer.missing m where m.shard = s.shard) as clean,
    coalesce((select through from buffer.tombstones where tenant = $2 and conversation = $3), 0) as erased
from buffer.shards s where shard = $1
for share of s

-- name: activity
-- $1 tenant, $2 user, $3 conversation
select active_at from buffer.conversations where tenant = $1 and user_id = $2 and conversation = $3

-- name: of_user
-- Newest activity first. $1 tenant, $2 user, $3 limit, $4 $5 after the one of this time and id, or NULL
select conversation, user_id, metadata, created_at, active_at
from buffer.conversations
where tenant = $1 and user_id = $2
  and (active_at, conversation) < (coalesce($4::timestamptz, 'infinity'), coalesce($5::text, ''))
order by active_at desc, conversation desc
limit $3
