-- Lists of a user's conversations, newest activity first.

alter table buffer.conversations add column active_at timestamptz;
update buffer.conversations c set active_at = coalesce((
    select i.created_at from buffer.items i
    where i.tenant = c.tenant and i.conversation = c.conversation and i.data is not null
    order by i.position desc
    limit 1
), c.created_at);
alter table buffer.conversations alter column active_at set default now(), alter column active_at set not null;
comment on column buffer.conversations.active_at is 'When the last item was accepted; kept for conversations that have a user.';

-- One direction for both columns: a page then begins at one place of the index, however many are equally old.
create index conversations_activity on buffer.conversations (tenant, user_id, active_at, conversation)
    where user_id is not null;
