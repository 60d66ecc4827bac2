-- Erasures on their way out of a database and into a restored one. They hold no content.

-- name: conversations
-- $1 tenant and $2 conversation after which the page begins, $3 limit
select tenant, conversation, through, erased_at from buffer.tombstones
where (tenant, conversation) > ($1, $2)
order by tenant, conversation
limit $3

-- name: users
-- $1 tenant and $2 user after which the page begins, $3 limit
select tenant, user_id, erased_at from buffer.user_tombstones
where (tenant, user_id) > ($1, $2)
order by tenant, user_id
limit $3

-- name: put_conversations
-- $1 tenants, $2 conversations, $3 positions, $4 times. Returns those that were not erased as far before.
insert into buffer.tombstones as t (tenant, conversation, through, erased_at)
select * from unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[])
order by 1, 2
on conflict (tenant, conversation) do update
set through = excluded.through, erased_at = excluded.erased_at
where t.through < excluded.through
returning tenant, conversation, through

-- name: put_users
-- $1 tenants, $2 users, $3 times. Returns those that were not known, or only as erased before.
insert into buffer.user_tombstones as t (tenant, user_id, erased_at)
select * from unnest($1::text[], $2::text[], $3::timestamptz[])
order by 1, 2
on conflict (tenant, user_id) do update set erased_at = excluded.erased_at
where t.erased_at < excluded.erased_at
returning user_id

-- name: fence
-- Whoever flushes a shard forgets which conversations it knows. $1 shards
update buffer.shards set fence = fence + 1 where shard = any($1::int[])
