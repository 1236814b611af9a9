-- Jobs that are recorded in a transaction of the application, and pushed after its commit.
--
-- A row of the outbox says who pushes. Its process pushes a delivery whose row it took after the
-- commit; the leader pushes every other one. Both decide by the clock of the database, so that
-- never both do.
set local lock_timeout = '3s';
alter table jobguard.outbox add column not_before timestamptz;
comment on column jobguard.outbox.not_before is
  'until then the process that recorded it pushes it, and not the leader; infinity: it was recorded in a '
  'transaction of the application, and no process has seen it since';
create index outbox_unseen on jobguard.outbox (token) where not_before = 'infinity';

-- Record first deliveries in the transaction of the caller. It takes no lock that another process
-- waits for, because this transaction may be long: older deliveries of the same job ids are
-- superseded after the commit. A time is the present one, not that of the transaction's start.
create function jobguard.record_in_transaction(p_source bigint, p_rows text)
returns void language plpgsql as $$
begin
  with given as (
    select r.*
    from jsonb_to_recordset(p_rows::jsonb)
      r(token uuid, job_id text, queue text, task text, priority int, attempt int, due float8,
        expires float8, trace text, derived bool, envelope text)
    -- A run that was killed and started again sends its jobs a second time.
    where not (r.derived and exists (select from jobguard.history h
                                     where h.source + 0 = p_source and h.token = r.token))
  ), added as (
    insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                               expires_at, trace, envelope, recorded_at)
    select p_source, g.token, g.job_id, g.queue, g.task, g.priority, g.attempt,
           to_timestamp(g.due), to_timestamp(g.expires), g.trace, decode(g.envelope, 'base64'),
           clock_timestamp()
    from given g
    on conflict do nothing
    returning token
  )
  insert into jobguard.outbox (source, token, unsent, not_before)
  select p_source, a.token, true, 'infinity' from added a;
end
$$;

-- Supersede all other unclaimed deliveries of the job ids of these, where Redis keeps one body for
-- each job id. Of several given ones of one id, the last one stays.
create function jobguard.supersede_others(p_source bigint, p_token uuid[])
returns void language plpgsql as $$
declare
  v_ids  text[];
  v_rows uuid[];
begin
  if (select s.one_body from jobguard.sources s where s.id = p_source) is false then
    return;
  end if;
  v_ids := array(
    select distinct j.job_id from jobguard.jobs j
    join jobguard.jobs o on o.job_id = j.job_id and o.source + 0 = p_source and o.token <> j.token
    where j.source + 0 = p_source and j.token = any (p_token));
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

-- Take the push of deliveries that this process has recorded in a transaction. Return those that
-- are committed and that the leader does not push. If the process dies now, the leader pushes them
-- after p_deadline seconds.
create function jobguard.take_committed(p_source bigint, p_token uuid[], p_deadline float8)
returns uuid[] language plpgsql as $$
declare
  v_taken uuid[];
begin
  -- If this is lost in a crash of PostgreSQL, the leader looks for these, and finds them present.
  perform set_config('synchronous_commit', 'off', true);
  -- The margin is for a leader that reads these rows at this moment.
  v_taken := array(
    select b.token from jobguard.outbox b
    where b.source + 0 = p_source and b.token = any (p_token)
      and b.not_before > clock_timestamp() + interval '250 ms');
  perform jobguard.supersede_others(p_source, array(
    select u.token from unnest(p_token) with ordinality u(token, nth)
    where u.token = any (v_taken) order by u.nth));
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_taken) order by j.token for key share;
  with taken as (
    update jobguard.outbox b
    set not_before = clock_timestamp() + make_interval(secs => p_deadline), unsent = false
    where b.source + 0 = p_source and b.token = any (v_taken)
      and b.not_before > clock_timestamp() + interval '250 ms'
    returning b.token
  )
  select coalesce(array_agg(t.token), '{}') into v_taken from taken t;
  return v_taken;
end
$$;

-- On behalf of the leader, see what was committed: it pushes these in p_wait seconds, unless their
-- processes take them before. Return how many it saw; null: the term is over.
create function jobguard.see_committed(
  p_namespace text, p_term bigint, p_source bigint, p_wait float8)
returns integer language plpgsql as $$
declare
  v_seen uuid[];
begin
  perform from jobguard.leader l where l.namespace = p_namespace and l.term = p_term for share;
  if not found then
    return null;
  end if;
  v_seen := array(
    select b.token from jobguard.outbox b
    where b.source + 0 = p_source and b.not_before = 'infinity' order by b.token limit 1000);
  if v_seen = '{}' then
    return 0;
  end if;
  perform jobguard.supersede_others(p_source, v_seen);
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_seen) order by j.token for key share;
  update jobguard.outbox b set not_before = clock_timestamp() + make_interval(secs => p_wait)
  where b.source + 0 = p_source and b.token = any (v_seen) and b.not_before = 'infinity';
  return cardinality(v_seen);
end
$$;
