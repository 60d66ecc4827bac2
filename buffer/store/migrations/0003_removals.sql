-- Removals and erasures: what is gone, kept without content, so that it never comes back.

-- Reads walk over live rows only, however many were removed.
alter table buffer.items drop constraint items_pkey;
create unique index items_live on buffer.items (tenant, conversation, position) where data is not null;

alter table buffer.replacements rename to removals;
alter table buffer.removals rename constraint replacements_pkey to removals_pkey;
alter table buffer.removals add column before bigint, add column item_id text collate "C";
update buffer.removals set before = position;
alter table buffer.removals alter column before set not null;
comment on table buffer.removals is 'The entry at "position" removed the items between "after" and "before", whenever they arrive: a spill may bring them later.';
comment on column buffer.removals.item_id is 'The one item that was deleted; NULL: the entry is an item that replaces others.';

create table buffer.tombstones (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    through      bigint           not null,
    erased_at    timestamptz      not null default now(),
    primary key (tenant, conversation)
);
comment on table buffer.tombstones is 'Conversations that were erased, up to a position: nothing at or before it is stored again.';

create table buffer.user_tombstones (
    tenant    text collate "C" not null,
    user_id   text collate "C" not null,
    erased_at timestamptz      not null default now(),
    primary key (tenant, user_id)
);
comment on table buffer.user_tombstones is 'Users that were erased, and when.';

create index conversations_user on buffer.conversations (tenant, user_id, conversation) where user_id is not null;

create table buffer.stale_views (
    id           bigint generated always as identity primary key,
    tenant       text   collate "C" not null,
    conversation text   collate "C" not null
);
comment on table buffer.stale_views is 'Conversations that were changed beside the stream: a flusher drops their cached views.';
