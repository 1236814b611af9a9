-- Plan the statements of the functions that hosts call once for a session, as those of an end; see 0019.
--
-- Each call of jobguard.record with a parent planned all its statements again, for 2.5 ms of 3; a record in a
-- transaction of the application, and the start of its push, took twice the time of PostgreSQL. A later
-- "create or replace" of one of these must repeat the clause.

-- Record first deliveries in the transaction of the caller; see 0015. With a join to the history, PostgreSQL
-- could read all of it for one job that a job sends.
create or replace function jobguard.record_in_transaction(p_source bigint, p_rows text)
returns void language plpgsql as $$
declare
  v_rows    jsonb := p_rows;
  v_derived uuid[] := array(select r.token from jsonb_to_recordset(v_rows) r(token uuid, derived bool)
                            where r.derived);
  -- A run that was killed and started again sends its jobs a second time.
  v_ended   uuid[] := array(select h.token from jobguard.history h
                            where h.source + 0 = p_source and h.token = any (v_derived));
begin
  with added as (
    insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                               expires_at, trace, recover, envelope,
                               recorded_at)
    select p_source, g.token, g.job_id, g.queue, g.task, g.priority, g.attempt,
           to_timestamp(g.due), to_timestamp(g.expires), g.trace, g.recover,
           decode(g.envelope, 'base64'),
           clock_timestamp()
    from jsonb_to_recordset(v_rows)
      g(token uuid, job_id text, queue text, task text, priority int, attempt int, due float8,
        expires float8, trace text, recover text, envelope text)
    where not g.token = any (v_ended)
    on conflict do nothing
    returning token
  )
  insert into jobguard.outbox (source, token, unsent, not_before)
  select p_source, a.token, true, 'infinity' from added a;
end
$$;

-- Supersede all other unclaimed deliveries of the job ids of these; see 0007. The ids come first, so that no plan
-- reads all jobs to find their other deliveries.
create or replace function jobguard.supersede_others(p_source bigint, p_token uuid[])
returns void language plpgsql as $$
declare
  v_ids  text[];
  v_rows uuid[];
begin
  if (select s.one_body from jobguard.sources s where s.id = p_source) is false then
    return;
  end if;
  v_ids := array(select j.job_id from jobguard.jobs j
                 where j.source + 0 = p_source and j.token = any (p_token));
  v_ids := array(select j.job_id from jobguard.jobs j
                 where j.source + 0 = p_source and j.job_id = any (v_ids)
                 group by j.job_id having count(*) > 1);
  if v_ids = '{}' then
    return;
  end if;
  perform pg_advisory_xact_lock(hashtextextended(i, p_source)) from unnest(v_ids) i order by i;
  v_rows := array(select j.token from jobguard.jobs j
                  where j.source + 0 = p_source and j.job_id = any (v_ids));
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_rows) order by j.token for update;
  with newest as (
    select distinct on (j.job_id) j.job_id, j.token
    from unnest(p_token) with ordinality u(token, nth)
    join jobguard.jobs j on j.source + 0 = p_source and j.token = u.token and j.token = any (v_rows)
    order by j.job_id, u.nth desc
  ), gone as (
    delete from jobguard.jobs j using newest n
    where j.source + 0 = p_source and j.token = any (v_rows) and j.job_id = n.job_id
      and j.token <> n.token
      and not exists (select from jobguard.running r where r.source + 0 = p_source
                        and r.token = j.token and r.token = any (v_rows))
      -- Another transaction has just recorded it: the process that pushes it supersedes this one.
      and (j.token = any (p_token)
           or not exists (select from jobguard.outbox b where b.source + 0 = p_source
                            and b.token = j.token and b.not_before = 'infinity'))
    returning j.*, n.token as next
  ), carried as (
    update jobguard.jobs j
    set recoveries = greatest(j.recoveries, g.recoveries), crashes = greatest(j.crashes, g.crashes)
    from (select x.next, max(x.recoveries) as recoveries, max(x.crashes) as crashes
          from gone x group by x.next) g
    where j.source + 0 = p_source and j.token = g.next and j.token = any (v_rows)
  ), unsuspected as (
    delete from jobguard.suspects s using gone g
    where s.source + 0 = p_source and s.token = g.token and s.token = any (v_rows)
  ), unboxed as (
    delete from jobguard.outbox b using gone g
    where b.source + 0 = p_source and b.token = g.token and b.token = any (v_rows)
  )
  insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                crashes, recorded_at, next)
  select g.source, g.token, g.job_id, g.queue, g.task, 'superseded', g.attempt, g.recoveries,
         g.crashes, g.recorded_at, g.next
  from gone g;
end
$$;

do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid::regprocedure from pg_proc p
    where p.pronamespace = 'jobguard'::regnamespace
      and p.proname in ('alone_with', 'begin_effect', 'cancel', 'claim', 'decline', 'record', 'record_beside',
                        'record_in_transaction', 'take_committed', 'take_key')
  loop
    execute format('alter function %s set plan_cache_mode = force_generic_plan', v_function);
  end loop;
end
$$;
