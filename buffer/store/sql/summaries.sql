-- Summaries, and the queue of what is due.

-- name: newest
-- The summary that counts. $1 tenant, $2 conversation
select through, text, made_by, created_at from buffer.summaries
where tenant = $1 and conversation = $2
order by through desc
limit 1

-- name: queue
-- Of these conversations, those of which $3 items or more are covered by no summary become due.
-- Returns how many there are, counted up to $3. $1 tenants, $2 conversations
with counted as materialized (
    select w.tenant, w.conversation, i.uncovered
    from unnest($1::text[], $2::text[]) as w (tenant, conversation)
    cross join lateral (
        select coalesce(max(s.through), 0) as through from buffer.summaries s
        where s.tenant = w.tenant and s.conversation = w.conversation
    ) covered
    cross join lateral (
        select count(*) as uncovered from (
            select from buffer.items i
            where i.tenant = w.tenant and i.conversation = w.conversation and i.data is not null
              and i.position > covered.through
            limit $3
        ) first
    ) i
), queued as (
    insert into buffer.summary_work (tenant, conversation)
    select tenant, conversation from counted where uncovered >= $3
    order by 1, 2
    on conflict (tenant, conversation) do update set wanted = summary_work.wanted + 1
)
select tenant, conversation, uncovered from counted

-- name: claim
-- One conversation that is due. $1 owner, $2 lease in seconds
update buffer.summary_work w set owner = $1, due_at = now() + make_interval(secs => $2::float8)
from (
    select tenant, conversation from buffer.summary_work
    where due_at <= now()
    order by due_at
    limit 1
    for update skip locked
) due
where w.tenant = due.tenant and w.conversation = due.conversation
returning w.tenant, w.conversation, w.wanted, w.failures

-- name: renew
-- $1 tenant, $2 conversation, $3 owner, $4 lease in seconds
update buffer.summary_work set due_at = now() + make_interval(secs => $4::float8)
where tenant = $1 and conversation = $2 and owner = $3
returning true

-- name: finish
-- Unless it was asked for again meanwhile. $1 tenant, $2 conversation, $3 owner, $4 wanted
delete from buffer.summary_work where tenant = $1 and conversation = $2 and owner = $3 and wanted = $4
returning true

-- name: again
-- Due at once. $1 tenant, $2 conversation, $3 owner
update buffer.summary_work set due_at = now(), owner = null, failures = 0
where tenant = $1 and conversation = $2 and owner = $3

-- name: postpone
-- $1 tenant, $2 conversation, $3 owner, $4 seconds
update buffer.summary_work
set due_at = now() + make_interval(secs => $4::float8), owner = null, failures = failures + 1
where tenant = $1 and conversation = $2 and owner = $3

-- name: release
-- $1 owners that stop
update buffer.summary_work set due_at = now(), owner = null where owner = any($1::text[])

-- name: target
-- How far a summary should go: up to the newest items, if enough are covered by none. One row.
-- `whole` is false while Postgres may lack items of the conversation that are acked.
-- $1 tenant, $2 conversation, $3 shard, $4 newest items that are left out, $5 how many are enough
select s.mode <> 'closing'
    and not exists (select from buffer.missing m where m.shard = s.shard)
    and not exists (select from buffer.dead_letters where tenant = $1 and conversation = $2) as whole,
    t.position
from buffer.shards s
left join lateral (
    select coalesce(max(through), 0) as through from buffer.summaries
    where tenant = $1 and conversation = $2
) covered on true
left join lateral (
    select position from buffer.items
    where tenant = $1 and conversation = $2 and data is not null
    order by position desc
    offset $4
    limit 1
) t on (
    select count(*) from (
        select from buffer.items
        where tenant = $1 and conversation = $2 and data is not null
          and position > covered.through and position <= t.position
        limit $5
    ) uncovered
) >= $5
where s.shard = $3

-- name: part
-- The next items to be covered, oldest first: one at least, and no more than fit.
-- $1 tenant, $2 conversation, $3 after, $4 through, $5 items, $6 bytes
select position, item_id, created_at, data
from (
    select *, sum(octet_length(data::text)) over (order by position) - octet_length(data::text) as before_it
    from (
        select position, item_id, created_at, data from buffer.items
        where tenant = $1 and conversation = $2 and position > $3 and position <= $4 and data is not null
        order by position
        limit $5
    ) next
) sized
where before_it < $6
order by position

-- name: lock
-- Summaries and deletions of a conversation wait for each other here. $1 tenant, $2 conversation
select from buffer.conversations where tenant = $1 and conversation = $2 for update

-- name: write
-- Only if it is still true: the summary that it was rolled forward from is the newest one, and the items that
-- follow it are those that were read. Under the lock of the conversation.
-- $1 tenant, $2 conversation, $3 shard, $4 through, $5 text, $6 made by, $7 after (0: from the first item),
-- $8 when the summary through $7 was made, $9 the positions that were read
insert into buffer.summaries (tenant, conversation, through, after, text, made_by)
select $1, $2, $4, $7, $5, $6
from buffer.shards s
where s.shard = $3 and s.mode <> 'closing'
  and not exists (select from buffer.missing m where m.shard = s.shard)
  and not exists (select from buffer.dead_letters where tenant = $1 and conversation = $2)
  and (
      select coalesce(max(through), 0) from buffer.summaries where tenant = $1 and conversation = $2
  ) = $7
  and (
      select created_at from buffer.summaries where tenant = $1 and conversation = $2 and through = $7
  ) is not distinct from $8::timestamptz
  and (
      select array_agg(position order by position) from buffer.items
      where tenant = $1 and conversation = $2 and position > $7 and position <= $4 and data is not null
  ) = $9::bigint[]
returning created_at

-- name: set
-- The application's own. Under the lock of the conversation.
-- $1 tenant, $2 conversation, $3 through, $4 text, $5 made by
insert into buffer.summaries (tenant, conversation, through, text, made_by)
values ($1, $2, $3, $4, $5)
on conflict (tenant, conversation, through) do update
set text = excluded.text, made_by = excluded.made_by, created_at = excluded.created_at, after = null
returning created_at

-- name: exists
-- Whether there is an item at a position. $1 tenant, $2 conversation, $3 position
select exists (
    select from buffer.items where tenant = $1 and conversation = $2 and position = $3 and data is not null
)

-- name: prune
-- $1 tenant, $2 conversation, $3 how many are kept
delete from buffer.summaries
where tenant = $1 and conversation = $2 and through < (
    select through from buffer.summaries where tenant = $1 and conversation = $2
    order by through desc
    offset $3 - 1
    limit 1
)
