-- Summaries: what stands for the older items of a conversation, and which of them are due (see buffer/summaries).

create table buffer.summaries (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    through      bigint           not null,
    after        bigint,
    text         text             not null,
    made_by      text             not null,
    created_at   timestamptz      not null default clock_timestamp(),
    primary key (tenant, conversation, through)
);
comment on table buffer.summaries is 'The newest one of a conversation counts; a few older ones are kept for when a deletion takes it away.';
comment on column buffer.summaries.through is 'The text stands for the items up to and including this position.';
comment on column buffer.summaries.after is 'It was rolled forward from the summary through this position; 0: from the first item; NULL: the application wrote it.';
comment on column buffer.summaries.made_by is 'The model that made it, "extractive", or "application".';

create table buffer.summary_work (
    tenant       text collate "C" not null,
    conversation text collate "C" not null,
    due_at       timestamptz      not null default now(),
    owner        text,
    wanted       bigint           not null default 1,
    failures     int              not null default 0,
    primary key (tenant, conversation)
);
comment on table buffer.summary_work is 'Conversations that may need a summary: a queue for the workers of all flushers.';
comment on column buffer.summary_work.due_at is 'Who takes the row moves it past the lease: if the owner is killed, it is due again then.';
comment on column buffer.summary_work.wanted is 'Counts how often it was asked for, so that what is asked for during the work is not lost at its end.';
create index summary_work_due on buffer.summary_work (due_at);
