-- The path: where each shard's appends go, who may append, and what was lost (see buffer/path).

alter table buffer.shards
    alter column path_epoch set default 1,
    add column mode         text   not null default 'direct' check (mode in ('stream', 'closing', 'direct')),
    add column run_id       text,
    add column fence_mark   text,
    add column ids_known_at timestamptz not null default '-infinity',
    add column next_direct  bigint not null default 0,
    add column direct_turns bigint not null default 0,
    add column spilled_turns bigint not null default 0,
    add column salvaged_turns bigint not null default 0,
    add column placed_turns bigint not null default 0,
    add column last_seen    bigint not null default 0;
comment on column buffer.shards.path_epoch is 'The epoch in which positions are given out; only ever grows.';
comment on column buffer.shards.mode is 'stream: appends go to Redis. closing: nowhere, while what is unflushed is spilled here. direct: here.';
comment on column buffer.shards.run_id is 'The incarnation of the Redis server that was granted the last stream epoch.';
comment on column buffer.shards.fence_mark is 'The fence in Redis over which the grant of this epoch counts.';
comment on column buffer.shards.ids_known_at is 'From then on, Redis knows every id of the idempotency window by itself.';
comment on column buffer.shards.placed_turns is 'Items of the last stream epoch that were spilled or salvaged, not flushed.';
comment on column buffer.shards.last_seen is 'The last position of that epoch that is known to have been given out.';
comment on column buffer.shards.next_direct is 'The next number of a direct append in this epoch.';

create table buffer.processes (
    process      text        primary key,
    beats        bigint      not null default 0,
    confirmed    bigint[]    not null,
    heartbeat_at timestamptz not null default now(),
    started_at   timestamptz not null default now()
);
comment on table buffer.processes is 'Accepting processes. Who did not beat for a heartbeat time-out may be judged dead.';
comment on column buffer.processes.confirmed is 'By shard: the last epoch before which the process acks nothing and retains nothing; NULL: not registered there.';

create table buffer.path_managers (
    manager       text        primary key,
    looks         bigint      not null default 0,
    looked_at     timestamptz not null default now(),
    redis_seen_at timestamptz not null default '-infinity'
);
comment on table buffer.path_managers is 'Flushers, in their role as managers of the path.';

create table buffer.missing (
    shard   int         not null references buffer.shards,
    process text        not null,
    since   timestamptz not null default now(),
    primary key (shard, process)
);
comment on table buffer.missing is 'Processes that may hold acked items of a shard, and were not heard of. While there are any, reads say complete: false.';

create table buffer.losses (
    id             bigint      generated always as identity primary key,
    shard          int         not null,
    kind           text        not null,
    turns          bigint      not null,
    first_position bigint,
    last_position  bigint,
    detail         text        not null,
    at             timestamptz not null default now()
);
comment on table buffer.losses is 'What was lost, or may be: never deleted, so that the count outlives every process.';

create table buffer.incarnations (
    id     bigint      generated always as identity primary key,
    store  text        not null check (store in ('redis', 'postgres')),
    detail text        not null,
    at     timestamptz not null default now()
);
comment on table buffer.incarnations is 'Each time a store was found to be another one, or an older one, than before.';

create table buffer.replacements (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    position     bigint           not null,
    after        bigint           not null,
    primary key (tenant, conversation, position)
);
comment on table buffer.replacements is 'Items after "after" and before "position" are replaced, whenever they arrive: a spill may bring them later.';

-- Shards that a release without the path had opened: whoever appended through it counts as missing, so that
-- what Redis holds is salvaged.
insert into buffer.missing (shard, process) select shard, 'an older release' from buffer.shards where path_epoch > 0;
update buffer.shards set path_epoch = path_epoch + 1;
