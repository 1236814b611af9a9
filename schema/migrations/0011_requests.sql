-- Jobs that SQL and schedules ask for.
--
--   jobguard.enqueue ──┐
--                      ├──► requests ──the leader renders──► jobs and outbox ──► Redis
--   schedules ──slot───┘
--
-- A request is durable with the transaction that asks for it. The leader takes it and records the delivery
-- in one transaction, so that each request becomes one delivery.

-- How messages of a source are serialized, as its processes report it.
alter table jobguard.sources add column serializer text not null default '';

-- Tasks that workers have completed. A task that is not here may be a typing error.
create table jobguard.tasks (
  source  bigint      not null,
  task    text        collate "C" not null,
  queue   text        collate "C" not null,
  seen_at timestamptz not null default now(),
  primary key (task, queue, source)
);

create table jobguard.requests (
  id           bigint      generated always as identity primary key,
  source       bigint      not null,
  job_id       text        collate "C" not null,
  queue        text        collate "C" not null,
  task         text        collate "C" not null,
  args         jsonb       not null default '[]',
  kwargs       jsonb       not null default '{}',
  due_at       timestamptz,
  priority     smallint    not null default 0,
  key          text,
  max_attempts integer,
  requested_at timestamptz not null default now(),
  error        text
) with (autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.05);
create index requests_job_id on jobguard.requests (job_id, source);
create index requests_waiting on jobguard.requests (id) where error is null;
comment on column jobguard.requests.error is 'why the leader cannot render it; it is kept for a person';

create table jobguard.schedules (
  namespace    text        collate "C" not null,
  name         text        collate "C" not null,
  source       bigint      not null,
  queue        text        not null,
  task         text        not null,
  args         jsonb       not null default '[]',
  kwargs       jsonb       not null default '{}',
  priority     smallint    not null default 0,
  max_attempts integer,
  cron         text,
  every        float8,
  rule         jsonb,
  timezone     text        not null default 'UTC',
  starts_at    timestamptz,
  ends_at      timestamptz,
  jitter       float8      not null default 0 check (jitter >= 0 and jitter < 86400),
  catch_up     text        not null default 'one' check (catch_up in ('one', 'all', 'skip')),
  version      uuid        not null default gen_random_uuid(),
  created_at   timestamptz not null default now(),
  next_at      timestamptz,
  fire_at      timestamptz,
  last_at      timestamptz,
  finished     boolean     not null default false,
  skipped      bigint      not null default 0,
  paused_at    timestamptz,
  error        text,
  primary key (name, namespace)
) with (fillfactor = 70, autovacuum_vacuum_threshold = 500);
comment on column jobguard.schedules.version is 'new with each change: a plan made before it is void';
comment on column jobguard.schedules.next_at is 'the next slot; null: the leader has not planned it yet';
comment on column jobguard.schedules.fire_at is 'the next slot with its jitter';
comment on column jobguard.schedules.error is 'why the leader cannot plan it';

-- One row for each slot that was fired: the primary key lets none fire twice.
create table jobguard.slots (
  namespace text        collate "C" not null,
  schedule  text        collate "C" not null,
  slot_at   timestamptz not null,
  job_id    text        not null,
  fired_at  timestamptz not null default now(),
  primary key (schedule, slot_at, namespace)
);
create index slots_fired_at on jobguard.slots (fired_at);

-- Find the source that a caller means, or explain which ones exist.
create function jobguard.source_of(p_namespace text, p_library text, p_source text)
returns bigint language plpgsql stable as $$
declare
  v_ids   bigint[];
  v_known text;
begin
  v_ids := array(
    select s.id from jobguard.sources s
    where s.namespace = p_namespace and (p_library is null or s.library = p_library)
      and (p_source is null or p_source in (s.name, s.address, s.id::text)));
  if cardinality(v_ids) = 1 then
    return v_ids[1];
  end if;
  select string_agg(format('%s at %s', s.library, coalesce(s.name, s.address)), ', '
                    order by s.library, s.address)
  into v_known
  from jobguard.sources s where s.namespace = p_namespace;
  if cardinality(v_ids) = 0 then
    raise exception using errcode = '22023', message = format(
      'no source%s is known in the namespace %L',
      coalesce(' of ' || p_library, '') || coalesce(' at ' || p_source, ''), p_namespace),
      hint = format('known: %s; a source is known once a guarded process has used it',
                    coalesce(v_known, 'none'));
  end if;
  raise exception using errcode = '22023',
    message = format('the namespace %L has %s sources%s: name one', p_namespace,
                     cardinality(v_ids), coalesce(' of ' || p_library, '')),
    hint = format('source => …, one of: %s', v_known);
end
$$;

-- Refuse what no worker could run, as far as the ledger can tell. An unknown queue is refused too if
-- p_queue_exists; an unknown task is refused with p_unknown = 'error', and else gives a warning.
create function jobguard.check_request(
  p_source bigint, p_queue text, p_task text, p_args jsonb, p_kwargs jsonb,
  p_priority integer, p_max_attempts integer, p_unknown text, p_queue_exists boolean)
returns void language plpgsql stable as $$
declare
  v_library text := (select s.library from jobguard.sources s where s.id = p_source);
  v_known   text;
begin
  if jsonb_typeof(p_args) is distinct from 'array' then
    raise exception using errcode = '22023', message = format(
      'args must be a JSON array, not %s', coalesce(jsonb_typeof(p_args), 'null'));
  end if;
  if jsonb_typeof(p_kwargs) is distinct from 'object' then
    raise exception using errcode = '22023', message = format(
      'kwargs must be a JSON object, not %s', coalesce(jsonb_typeof(p_kwargs), 'null'));
  end if;
  if coalesce(p_task, '') = '' or (v_library = 'rq' and position('.' in p_task) = 0) then
    raise exception using errcode = '22023', message = format('the task is %L', p_task),
      hint = case when v_library = 'rq' then 'a task of RQ is the import path of a function: module.function'
                  else 'a task is the name by which the workers know it' end;
  end if;
  if p_priority is null or p_priority not between 0 and (case when v_library = 'celery' then 9 else 0 end) then
    raise exception using errcode = '22023', message = format('the priority is %s', coalesce(p_priority::text, 'null')),
      hint = case when v_library = 'celery' then 'a priority of Celery is 0 to 9'
                  else 'a message of this library has no priority: use another queue' end;
  end if;
  if p_max_attempts < 1 or (p_max_attempts is not null and v_library = 'celery') then
    raise exception using errcode = '22023', message = format('max_attempts is %s', p_max_attempts),
      hint = case when v_library = 'celery' then 'a message of Celery has no limit of attempts: set max_retries on the task'
                  else 'it must be 1 or more' end;
  end if;
  if coalesce(p_unknown, '') not in ('warn', 'error', 'accept') then
    raise exception using errcode = '22023', message = format('unknown is %L', p_unknown),
      hint = 'one of: warn, error, accept';
  end if;
  if p_unknown = 'accept' then
    return;
  end if;
  if not exists (select from jobguard.queues q
                 where q.source = p_source and coalesce(q.name, q.queue) = p_queue)
     and not exists (select from jobguard.workers w
                     where w.source = p_source and p_queue = any (w.queues))
     and not exists (select from jobguard.tasks t where t.source = p_source and t.queue = p_queue)
  then
    select string_agg(distinct coalesce(q.name, q.queue), ', ') into v_known
    from jobguard.queues q where q.source = p_source;
    if p_queue_exists or p_unknown = 'error' then
      raise exception using errcode = '22023',
        message = format('no queue %L is known: no guarded process has used it', p_queue),
        hint = format('known: %s', coalesce(v_known, 'none'));
    end if;
    raise warning using message = format('no guarded process has used the queue %L: is it a typing error?', p_queue),
      hint = format('known: %s', coalesce(v_known, 'none'));
  end if;
  if not exists (select from jobguard.tasks t where t.source = p_source and t.task = p_task)
  then
    select string_agg(t.task, ', ') into v_known from (
      select distinct k.task from jobguard.tasks k where k.source = p_source order by k.task limit 20) t;
    if p_unknown = 'error' then
      raise exception using errcode = '22023',
        message = format('no worker has completed the task %L', p_task),
        hint = format('known: %s', coalesce(v_known, 'none'));
    end if;
    raise warning using message = format('no worker has completed the task %L: is it a typing error?', p_task),
      hint = format('known: %s', coalesce(v_known, 'none'));
  end if;
end
$$;

-- Ask for a job, in the transaction of the caller. Returns its id. The leader sends it within a second of
-- the commit.
create function jobguard.enqueue(
  library text, queue text, task text, args jsonb default '[]', kwargs jsonb default '{}',
  due timestamptz default null, priority integer default 0, key text default null,
  max_attempts integer default null, source text default null, namespace text default 'default',
  unknown text default 'warn')
returns text language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_source bigint := jobguard.source_of(enqueue.namespace, enqueue.library, enqueue.source);
  v_job_id text;
begin
  perform jobguard.check_request(
    v_source, enqueue.queue, enqueue.task, enqueue.args, enqueue.kwargs, enqueue.priority,
    enqueue.max_attempts, enqueue.unknown, true);
  insert into jobguard.requests (source, job_id, queue, task, args, kwargs, due_at, priority, key,
                                 max_attempts)
  values (v_source, gen_random_uuid()::text, enqueue.queue, enqueue.task, enqueue.args, enqueue.kwargs,
          enqueue.due, enqueue.priority, enqueue.key, enqueue.max_attempts)
  returning job_id into v_job_id;
  return v_job_id;
end
$$;

-- Cancel a job that has not completed. Returns how many deliveries of it were cancelled. A worker that runs
-- it is not interrupted.
create function jobguard.cancel_job(job_id text, namespace text default 'default')
returns integer language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_source record;
  v_count  integer;
  v_total  integer := 0;
begin
  for v_source in select s.id from jobguard.sources s where s.namespace = cancel_job.namespace loop
    with gone as (
      delete from jobguard.requests r
      where r.job_id = cancel_job.job_id and r.source + 0 = v_source.id returning *
    )
    insert into jobguard.history (source, token, job_id, queue, task, outcome, recorded_at)
    select g.source, gen_random_uuid(), g.job_id, g.queue, g.task, 'cancelled', g.requested_at from gone g;
    get diagnostics v_count = row_count;
    v_total := v_total + v_count + jobguard.cancel(
      v_source.id,
      array(select j.token from jobguard.jobs j
            where j.source + 0 = v_source.id and j.job_id = cancel_job.job_id),
      '{}', null, null, null, '{}');
  end loop;
  return v_total;
end
$$;

-- Return every delivery of a job, newest first, without its arguments.
create function jobguard.job(job_id text, namespace text default 'default')
returns table (library text, queue text, task text, state text, attempt integer, recorded_at timestamptz,
               due_at timestamptz, claimed_at timestamptz, ended_at timestamptz, progress real, attrs jsonb,
               error text)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select d.library, d.queue, d.task, d.state, d.attempt, d.recorded_at, d.due_at, d.claimed_at, d.ended_at,
         d.progress, d.attrs, d.error
  from (
    select s.library, r.queue, r.task, case when r.error is null then 'requested' else 'held' end as state,
           1 as attempt, r.requested_at as recorded_at, r.due_at, null::timestamptz as claimed_at,
           null::timestamptz as ended_at, null::real as progress, null::jsonb as attrs, r.error
    from jobguard.sources s join jobguard.requests r on r.source = s.id
    where s.namespace = $2 and r.job_id = $1
    union all
    select s.library, j.queue, j.task,
           case when r.token is not null then 'processing'
                when j.due_at > now() then 'scheduled' else 'pending' end,
           j.attempt, j.recorded_at, j.due_at, r.claimed_at, null, r.progress, r.attrs, null
    from jobguard.sources s
    join jobguard.jobs j on j.source + 0 = s.id
    left join jobguard.running r on r.source = j.source and r.token = j.token
    where s.namespace = $2 and j.job_id = $1
    union all
    select s.library, h.queue, h.task, h.outcome::text, h.attempt, h.recorded_at, null, h.claimed_at,
           h.ended_at, null, null, h.errors[array_upper(h.errors, 1)]
    from jobguard.sources s join jobguard.history h on h.source + 0 = s.id
    where s.namespace = $2 and h.job_id = $1
  ) d
  order by d.ended_at desc nulls first, d.recorded_at desc
$$;

-- Add a schedule, or change the one of this name. Returns whether anything changed. The same call again
-- changes nothing, so that every process of an application may make it at its start.
create function jobguard.add_schedule(
  name text, library text, queue text, task text, args jsonb default '[]', kwargs jsonb default '{}',
  cron text default null, every interval default null, rule jsonb default null,
  timezone text default 'UTC', starts_at timestamptz default null, ends_at timestamptz default null,
  jitter interval default '0', catch_up text default 'one', priority integer default 0,
  max_attempts integer default null, source text default null, namespace text default 'default',
  unknown text default 'warn')
returns boolean language plpgsql as $$
#variable_conflict use_column
declare
  v_source bigint := jobguard.source_of(add_schedule.namespace, add_schedule.library, add_schedule.source);
  v_every  float8 := extract(epoch from add_schedule.every);
begin
  perform jobguard.check_request(
    v_source, add_schedule.queue, add_schedule.task, add_schedule.args, add_schedule.kwargs,
    add_schedule.priority, add_schedule.max_attempts, add_schedule.unknown, false);
  if coalesce(add_schedule.name, '') = '' or octet_length(add_schedule.name) > 200 then
    raise exception using errcode = '22023', message = 'the name of a schedule has 1 to 200 bytes';
  end if;
  if num_nonnulls(add_schedule.cron, add_schedule.every, add_schedule.rule) <> 1 then
    raise exception using errcode = '22023', message = 'a schedule has one of cron, every and rule';
  end if;
  if v_every < 1 or extract(year from add_schedule.every) <> 0 or extract(month from add_schedule.every) <> 0 then
    raise exception using errcode = '22023', message = format('every is %s', add_schedule.every),
      hint = 'it is 1 second or more, in seconds to weeks; for months, give a cron expression';
  end if;
  if add_schedule.cron !~ '^\s*(@\w+|\S+(\s+\S+){4,5})\s*$' then
    raise exception using errcode = '22023', message = format('the cron expression is %L', add_schedule.cron),
      hint = 'it has five fields, or six with seconds first';
  end if;
  perform now() at time zone add_schedule.timezone;
  insert into jobguard.schedules as s (
    namespace, name, source, queue, task, args, kwargs, priority, max_attempts, cron, every, rule,
    timezone, starts_at, ends_at, jitter, catch_up)
  values (
    add_schedule.namespace, add_schedule.name, v_source, add_schedule.queue, add_schedule.task,
    add_schedule.args, add_schedule.kwargs, add_schedule.priority, add_schedule.max_attempts,
    add_schedule.cron, v_every, add_schedule.rule, add_schedule.timezone, add_schedule.starts_at,
    add_schedule.ends_at, extract(epoch from add_schedule.jitter), add_schedule.catch_up)
  on conflict (name, namespace) do update
  set source = excluded.source, queue = excluded.queue, task = excluded.task, args = excluded.args,
      kwargs = excluded.kwargs, priority = excluded.priority, max_attempts = excluded.max_attempts,
      cron = excluded.cron, every = excluded.every, rule = excluded.rule, timezone = excluded.timezone,
      starts_at = excluded.starts_at, ends_at = excluded.ends_at, jitter = excluded.jitter,
      catch_up = excluded.catch_up, version = gen_random_uuid(), next_at = null, fire_at = null,
      finished = false, error = null
  where (s.source, s.queue, s.task, s.args, s.kwargs, s.priority, s.max_attempts, s.cron, s.every, s.rule,
         s.timezone, s.starts_at, s.ends_at, s.jitter, s.catch_up)
    is distinct from
        (excluded.source, excluded.queue, excluded.task, excluded.args, excluded.kwargs, excluded.priority,
         excluded.max_attempts, excluded.cron, excluded.every, excluded.rule, excluded.timezone,
         excluded.starts_at, excluded.ends_at, excluded.jitter, excluded.catch_up);
  return found;
end
$$;

create function jobguard.require_schedule(p_found boolean, p_name text, p_namespace text)
returns void language plpgsql as $$
begin
  if p_found is not true then
    raise exception using errcode = '22023',
      message = format('no schedule %L is known in the namespace %L', p_name, p_namespace),
      hint = format('known: %s', coalesce(
        (select string_agg(s.name, ', ' order by s.name) from jobguard.schedules s
         where s.namespace = p_namespace), 'none'));
  end if;
end
$$;

create function jobguard.remove_schedule(name text, namespace text default 'default')
returns void language plpgsql as $$
#variable_conflict use_column
begin
  delete from jobguard.schedules s
  where s.name = remove_schedule.name and s.namespace = remove_schedule.namespace;
  perform jobguard.require_schedule(found, remove_schedule.name, remove_schedule.namespace);
end
$$;

-- Stop a schedule until it is resumed. Slots in between are not made up for.
create function jobguard.pause_schedule(name text, namespace text default 'default')
returns void language plpgsql as $$
#variable_conflict use_column
begin
  update jobguard.schedules s set paused_at = coalesce(s.paused_at, now())
  where s.name = pause_schedule.name and s.namespace = pause_schedule.namespace;
  perform jobguard.require_schedule(found, pause_schedule.name, pause_schedule.namespace);
end
$$;

create function jobguard.resume_schedule(name text, namespace text default 'default')
returns void language plpgsql as $$
#variable_conflict use_column
begin
  update jobguard.schedules s
  set paused_at = null, error = null, version = gen_random_uuid(), next_at = null, fire_at = null
  where s.name = resume_schedule.name and s.namespace = resume_schedule.namespace;
  perform jobguard.require_schedule(found, resume_schedule.name, resume_schedule.namespace);
end
$$;

-- Ask for one run now, beside the slots. Returns the id of the job.
create function jobguard.run_schedule(name text, namespace text default 'default')
returns text language plpgsql as $$
#variable_conflict use_column
declare
  v_job_id text;
begin
  insert into jobguard.requests (source, job_id, queue, task, args, kwargs, priority, max_attempts)
  select s.source, gen_random_uuid()::text, s.queue, s.task, s.args, s.kwargs, s.priority, s.max_attempts
  from jobguard.schedules s
  where s.name = run_schedule.name and s.namespace = run_schedule.namespace
  returning job_id into v_job_id;
  perform jobguard.require_schedule(found, run_schedule.name, run_schedule.namespace);
  return v_job_id;
end
$$;

-- These run with the rights of the owner; see schema/roles.py.
revoke execute on function jobguard.enqueue, jobguard.cancel_job, jobguard.job from public;

-- The roles that may write jobs may write these too, without a new run of grants.sql.
do $$
declare
  v_right record;
begin
  for v_right in
    select case a.grantee when 0 then 'public' else quote_ident(a.grantee::regrole::text) end as role,
           a.privilege_type as privilege
    from pg_class c, aclexplode(c.relacl) a
    where c.oid = 'jobguard.jobs'::regclass and a.grantee <> c.relowner
      and a.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
  loop
    execute format('grant %s on jobguard.tasks, jobguard.requests, jobguard.schedules, jobguard.slots to %s',
                   v_right.privilege, v_right.role);
    execute format('grant execute on function jobguard.enqueue, jobguard.cancel_job, jobguard.job to %s',
                   v_right.role);
  end loop;
end
$$;
