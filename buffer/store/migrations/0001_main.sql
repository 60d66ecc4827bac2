-- The main job: items, the conversations that they belong to, and the shards that carry them here.

create table buffer.meta (
    key   text primary key,
    value text not null
);
comment on table buffer.meta is 'Facts fixed at the first start, such as the number of shards.';

create table buffer.items (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    position     bigint           not null,
    item_id      text collate "C" not null,
    created_at   timestamptz      not null,
    -- json, not jsonb: jsonb refuses \u0000 and lone surrogates, which are legal in a chat message.
    data         json,
    primary key (tenant, conversation, position),
    constraint items_identity unique (tenant, conversation, item_id)
);
comment on table buffer.items is 'One row an item, in position order. data NULL: the item was removed; the row keeps its id from being used again.';
comment on column buffer.items.position is 'path epoch << 40 | number in the shard; only ever grows within a conversation.';

create table buffer.conversations (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    user_id      text collate "C",
    metadata     json,
    created_at   timestamptz      not null,
    primary key (tenant, conversation)
);

create table buffer.shards (
    shard           int         primary key,
    path_epoch      bigint      not null default 0,
    owner           text,
    fence           bigint      not null default 0,
    lease_until     timestamptz not null default '-infinity',
    flushed_through bigint      not null default 0,
    flushed_turns   bigint      not null default 0,
    flushed_at      timestamptz
);
comment on table buffer.shards is 'One row a shard: who flushes it, and how far.';
comment on column buffer.shards.path_epoch is 'The epoch in which positions are given out; 0 before Redis was first granted one.';
comment on column buffer.shards.fence is 'Grows with every change of owner; a flush commits only under the fence that it began with.';
comment on column buffer.shards.flushed_through is 'The last position that is committed here; written in the same transaction as the rows.';

create table buffer.flushers (
    flusher      text        primary key,
    heartbeat_at timestamptz not null,
    started_at   timestamptz not null default now()
);
comment on table buffer.flushers is 'Live flushers, so that each knows its fair share of the shards.';

create table buffer.dead_letters (
    id           bigint generated always as identity primary key,
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    item_id      text collate "C" not null,
    position     bigint           not null,
    payload      bytea            not null,
    reason       text             not null,
    created_at   timestamptz      not null default now(),
    unique (tenant, conversation, position, item_id)
);
comment on table buffer.dead_letters is 'Items that could not be stored, kept with their payload and the reason.';
