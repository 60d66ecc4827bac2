-- Views that are stale, because something was committed beside the stream.

-- name: note
-- $1 tenants, $2 conversations
insert into buffer.stale_views (tenant, conversation) select * from unnest($1::text[], $2::text[])

-- name: take
-- Several flushers take different ones. $1 limit
delete from buffer.stale_views where id in (
    select id from buffer.stale_views order by id limit $1 for update skip locked
)
returning tenant, conversation

-- name: paths
select mode, path_epoch, flushed_through from buffer.shards order by shard
