-- The ledger: what is owed, who runs it, how it ended, and who looks after it.
--
-- The state of a job is the table it stands in; there is no status column that could drift.
--
--   jobs ──claim──► running            jobs and running are small, and vacuumed by the leader
--     └────end────► history            history is partitioned by day; retention drops partitions

create type jobguard.outcome as enum ('completed', 'failed', 'dead', 'cancelled', 'superseded');

create type jobguard.cause as enum (
  'incident', 'topology', 'eviction', 'worker', 'push', 'untrusted', 'unexplained');

-- What this database is, so that a copy of it, or the wrong one, is noticed before anything is pushed.
create table jobguard.installation (
  singleton         boolean primary key default true check (singleton),
  id                uuid not null default gen_random_uuid(),
  name              text,
  system_identifier text,
  database_oid      oid,
  created_at        timestamptz not null default now()
);
comment on table jobguard.installation is 'one row: the identity of this ledger';

-- What is owed. Written once, at record; gone when it ends.
create table jobguard.jobs (
  source      bigint      not null,
  token       uuid        not null,
  job_id      text        collate "C" not null,
  queue       text        collate "C" not null,
  task        text        collate "C" not null,
  priority    smallint    not null default 0,
  attempt     smallint    not null default 1,
  recoveries  smallint    not null default 0,
  crashes     smallint    not null default 0,
  declined    smallint    not null default 0,
  claims      integer     not null default 0,
  due_at      timestamptz,
  expires_at  timestamptz,
  not_before  timestamptz,
  recorded_at timestamptz not null default now(),
  key         text,
  trace       text,
  envelope    bytea       not null,
  primary key (source, token)
) with (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);
create index jobs_job_id on jobguard.jobs (source, job_id);
comment on column jobguard.jobs.token is 'one push of the job; ours, random, new at every push';
comment on column jobguard.jobs.declined is 'how many workers could not begin it (an unknown task)';
comment on column jobguard.jobs.claims is 'the highest claim number that was voided';
comment on column jobguard.jobs.not_before is 'a job recovered from a worker''s death waits until then';

-- Claims. The primary key is the fence.
create table jobguard.running (
  source       bigint      not null,
  token        uuid        not null,
  number       integer     not null,
  nonce        uuid        not null,
  worker       uuid        not null,
  pid          integer     not null,
  execution    text,
  claimed_at   timestamptz not null default now(),
  returned_at  timestamptz,
  heartbeat_at timestamptz,
  progress     real,
  attrs        jsonb,
  primary key (source, token)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0);

-- Tombstones. No unique key is possible over partitions: writers look before they write, readers take the first.
create table jobguard.history (
  source      bigint           not null,
  token       uuid             not null,
  job_id      text             collate "C" not null,
  queue       text             collate "C" not null,
  task        text             collate "C" not null,
  outcome     jobguard.outcome not null,
  attempt     smallint         not null default 1,
  recoveries  smallint         not null default 0,
  crashes     smallint         not null default 0,
  number      integer,
  worker      uuid,
  recorded_at timestamptz,
  claimed_at  timestamptz,
  ended_at    timestamptz      not null default now(),
  next        uuid,
  errors      text[],
  envelope    bytea
) partition by range (ended_at);
create index history_token on jobguard.history (source, token);
create index history_job_id on jobguard.history (source, job_id);
create index history_dead on jobguard.history (source, ended_at) where outcome in ('failed', 'dead');
create table jobguard.history_default partition of jobguard.history default;
comment on column jobguard.history.envelope is 'kept for failed and dead only: what a requeue needs';

-- Guarded worker processes: one row a boot, one small write a beat.
create table jobguard.workers (
  id               uuid        primary key,
  source           bigint      not null,
  name             text        not null default '',
  host             text        not null default '',
  pid              integer     not null default 0,
  queues           text[]      not null default '{}',
  claims           uuid[]      not null default '{}',
  beat             bigint      not null default 0,
  beat_at          timestamptz not null default now(),
  previous_beat_at timestamptz not null default now(),
  started_at       timestamptz not null default now(),
  unflushed_since  timestamptz,
  pulse_epoch      uuid,
  pulse_n          bigint,
  fence            boolean     not null default true,
  left_at          timestamptz,
  dead_at          timestamptz
) with (fillfactor = 50, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);
create index workers_source on jobguard.workers (source);

-- Seen absent once. Rows are deleted; there are no watermarks anywhere.
create table jobguard.suspects (
  source  bigint         not null,
  token   uuid           not null,
  cause   jobguard.cause not null,
  mark    text           not null default '',
  seen_at timestamptz    not null default now(),
  primary key (source, token)
) with (fillfactor = 70, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.05);

-- Recorded, and still to be pushed.
create table jobguard.outbox (
  source     bigint      not null,
  token      uuid        not null,
  created_at timestamptz not null default now(),
  unsent     boolean     not null default false,
  primary key (source, token)
) with (fillfactor = 70, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.05);
comment on column jobguard.outbox.unsent is
  'its producer surely sent nothing to Redis, so that nobody can have run it';

-- What libraries count in Redis: a continuation waits until so many members have ended (a chord, a
-- group's barrier). Rows of members go when the join is closed; the join stays, so that it is closed once.
create table jobguard.joins (
  source    bigint      not null,
  id        text        collate "C" not null,
  size      integer     not null default 0,
  state     bytea       not null default '',
  opened_at timestamptz not null default now(),
  closed_at timestamptz,
  closed_by uuid,
  primary key (source, id)
) with (autovacuum_vacuum_scale_factor = 0.05);
create index joins_open on jobguard.joins (source, id) where closed_at is null;
create index joins_closed on jobguard.joins (closed_at) where closed_at is not null;
comment on column jobguard.joins.closed_by is 'the delivery of the continuation; null: given up';

create table jobguard.join_parts (
  source   bigint      not null,
  join_id  text        collate "C" not null,
  job_id   text        collate "C" not null,
  token    uuid        not null,
  queue    text        collate "C" not null,
  state    bytea       not null,
  envelope bytea       not null default '',
  ended_at timestamptz not null default clock_timestamp(),
  primary key (source, join_id, job_id)
) with (autovacuum_vacuum_scale_factor = 0.05);

-- One leader a namespace. The brake stands here, so that whoever renews the lease sees it.
create table jobguard.leader (
  namespace  text        primary key,
  term       bigint      not null,
  holder     uuid        not null,
  host       text        not null,
  pid        integer     not null,
  elected_at timestamptz not null default now(),
  expires_at timestamptz not null,
  paused_at  timestamptz,
  held       jsonb       not null default '{}'
) with (fillfactor = 50);
comment on column jobguard.leader.held is 'queues held: {"<source>/<queue>": {"since": …, "reason": …}}';

-- Brokers, never with a password; the pulse that Postgres knows of; what its producers were set to.
create table jobguard.sources (
  id          bigint      primary key,
  namespace   text        not null,
  library     text        not null,
  address     text        not null,
  prefix      text        not null default '',
  name        text,
  fence       boolean     not null default true,
  settings    text        not null default '',
  one_body    boolean     not null default true,
  pulse_epoch uuid,
  pulse_n     bigint,
  run_id      text,
  watched_at  timestamptz,
  created_at  timestamptz not null default now()
) with (fillfactor = 50);
comment on column jobguard.sources.one_body is 'the library keeps one body of a job id in Redis';
comment on column jobguard.sources.watched_at is 'when a leader last moved the pulse in its Redis';
create index sources_namespace on jobguard.sources (namespace);

create table jobguard.incidents (
  id         bigint      generated always as identity primary key,
  source     bigint      not null,
  cause      text        not null,
  detail     text        not null default '',
  opened_at  timestamptz not null default now(),
  epoch      uuid,
  missing    integer     not null default 0,
  restored   integer     not null default 0,
  closed_at  timestamptz
);
create index incidents_open on jobguard.incidents (source) where closed_at is null;

create table jobguard.queues (
  source        bigint      not null,
  queue         text        collate "C" not null,
  trusted_since timestamptz,
  clean_since   timestamptz,
  unguarded     text[]      not null default '{}',
  unguarded_at  timestamptz,
  primary key (source, queue)
);
comment on column jobguard.queues.trusted_since is
  'what was recorded since then was only ever seen by guarded workers; outlives the workers';

-- Retention, as the owner of the tables, so that a role with DML rights alone can call it.
-- Makes the partitions of the coming days, drops what is older than asked, and empties the default
-- partition into its days if ever anything fell into it.
create function jobguard.rotate(retention interval default interval '7 days')
returns integer language plpgsql security definer
  set search_path = jobguard, pg_temp set timezone = 'UTC'
  -- A long reader of history (a backup) must not make every end wait behind us.
  set lock_timeout = '1s' as $$
declare
  day     date;
  part    text;
  dropped integer := 0;
  stray   record;
begin
  if retention < interval '1 hour' then
    raise exception 'retention must be an hour at least, not %', retention;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('jobguard.rotate', 0));
  for day in select generate_series(current_date - 1, current_date + 7, interval '1 day')::date loop
    part := 'history_' || to_char(day, 'YYYYMMDD');
    continue when to_regclass('jobguard.' || part) is not null;
    create temporary table stray_history on commit drop as
      select * from history_default where ended_at >= day and ended_at < day + 1;
    delete from history_default where ended_at >= day and ended_at < day + 1;
    execute format('create table jobguard.%I partition of jobguard.history for values from (%L) to (%L)',
                   part, day, day + 1);
    execute format('insert into jobguard.%I select * from stray_history', part);
    drop table stray_history;
  end loop;
  for stray in
    select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'jobguard.history'::regclass and c.relname ~ '^history_\d{8}$'
  loop
    if to_date(right(stray.relname, 8), 'YYYYMMDD') + 1 < now() - retention then
      execute format('drop table jobguard.%I', stray.relname);
      dropped := dropped + 1;
    end if;
  end loop;
  delete from history_default where ended_at < now() - retention;
  delete from joins where coalesce(closed_at, opened_at) < now() - retention;
  delete from join_parts p where not exists (
    select from joins x where x.source = p.source and x.id = p.join_id);
  return dropped;
end
$$;

insert into jobguard.installation default values;
select jobguard.rotate();
