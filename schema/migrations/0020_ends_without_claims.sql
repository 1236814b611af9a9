-- Count the end of a run without a claim also while another worker has the claim.
--
-- A worker that dies in an outage of PostgreSQL leaves a note in Redis that it began a job, from which the leader
-- makes its claim after the outage. If a second worker ran the job in the same outage, its end came late, and the
-- job was restored when the first worker was declared dead.

-- End deliveries on behalf of their claims; see 0002 and 0019.
create or replace function jobguard.end(
  p_source bigint, p_token uuid[], p_number int[], p_outcome text[], p_worker uuid[],
  p_ended float8[], p_job_id text[], p_queue text[], p_task text[], p_error text[],
  p_join text[], p_part bytea[])
returns text[] language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  v_ended   uuid[] := '{}';
  v_unknown uuid[] := '{}';
  v_looked  uuid[];
  v_rows    uuid[] := p_token;
  v_kept    bool := (select l.keep_envelopes from jobguard.sources s
                     join jobguard.leader l on l.namespace = s.namespace where s.id = p_source);
begin
  -- A delivery without a row may be recorded at this moment. The locks of such tokens come before
  -- those of rows, as in jobguard.record, and all are taken in the order of the tokens.
  v_looked := array(select distinct t from unnest(p_token) t
                    where not exists (select from jobguard.jobs j
                                      where j.source + 0 = p_source and j.token = t
                                        and j.token = any (p_token)));
  if v_looked <> '{}' then
    perform jobguard.alone_with(v_looked);
    -- Also lock the deliveries that the unknown ones replaced; they are superseded below.
    v_rows := v_rows || array(
      select j.token from unnest(p_token, p_job_id) e(token, job_id)
      join jobguard.jobs j on j.source + 0 = p_source and j.job_id = e.job_id
        and j.job_id = any (p_job_id)
      where e.token = any (v_looked));
  end if;
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_rows) order by j.token for update;
  with said as (
    select distinct on (e.token) e.*
    from unnest(p_token, p_number, p_outcome, p_worker, p_ended, p_error, p_join, p_part)
      with ordinality e(token, number, outcome, worker, ended, error, join_id, part, nth)
    order by e.token, e.nth
  ), valid as (
    -- A stale number changes nothing. But a completed run is completed, if no other worker runs the
    -- delivery now. Number 0 is a run without a claim, in an outage of PostgreSQL. If it has completed,
    -- the delivery is completed, also if another worker has a claim now. If it ended in another way,
    -- it ends the delivery only if no other worker runs it.
    select s.*, r.claimed_at
    from said s
    join jobguard.jobs j on j.source + 0 = p_source and j.token = s.token and j.token = any (p_token)
    left join jobguard.running r on r.source + 0 = p_source and r.token = s.token
      and r.token = any (p_token)
    where r.number = s.number
       or (r.token is null and s.outcome = 'completed')
       or (s.number = 0 and (s.outcome = 'completed' or r.token is null or r.worker = s.worker
                             or not exists (select from jobguard.workers w
                                            where w.id = r.worker and jobguard.holds(w, r))))
  ), rows as (
    delete from jobguard.jobs j
    where j.source + 0 = p_source and j.token = any (array(select v.token from valid v))
    returning j.*
  ), gone as (
    select r.*, v.number, v.outcome, v.worker, v.ended, v.error, v.claimed_at, v.join_id, v.part
    from rows r join valid v on v.token = r.token
  ), parts as (
    insert into jobguard.join_parts (source, join_id, job_id, token, queue, state, envelope)
    select g.source, g.join_id, g.job_id, g.token, g.queue, g.part, g.envelope from gone g
    where g.join_id is not null and not jobguard.is_closed(p_source, g.join_id)
    on conflict do nothing
  ), unclaimed as (
    delete from jobguard.running r
    where r.source + 0 = p_source and r.token = any (array(select v.token from valid v))
  ), unsuspected as (
    delete from jobguard.suspects s
    where s.source + 0 = p_source and s.token = any (array(select v.token from valid v))
  ), unboxed as (
    delete from jobguard.outbox b
    where b.source + 0 = p_source and b.token = any (array(select v.token from valid v))
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, ended_at, errors,
                                  envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, g.outcome::jobguard.outcome, g.attempt,
           g.recoveries, g.crashes, g.number, g.worker, g.recorded_at, g.claimed_at,
           -- The worker's clock, within limits, because retention depends on it.
           least(now(), greatest(to_timestamp(g.ended), now() - interval '1 hour')),
           case when g.error is not null then array[g.error] end,
           case when g.outcome in ('failed', 'dead') or v_kept then g.envelope end
    from gone g returning token
  )
  select v_ended || array(select token from tombstones) into v_ended;

  if cardinality(v_ended) < cardinality(p_token) then
    -- A delivery that still has a row was reported with a stale number.
    v_unknown := array(
      select distinct t from unnest(p_token) t
      where not t = any (v_ended)
        and not exists (select from jobguard.jobs j where j.source + 0 = p_source
                          and j.token = t and j.token = any (p_token))
        and not exists (select from jobguard.history h where h.source + 0 = p_source
                          and h.token = t and h.token = any (p_token)));
  end if;

  -- A delivery whose end was found in the library, or was reported by another process, still adds
  -- its part to its join.
  if cardinality(array_remove(p_join, null)) > 0 then
    insert into jobguard.join_parts (source, join_id, job_id, token, queue, state)
    select distinct on (e.join_id, h.job_id) p_source, e.join_id, h.job_id, e.token, h.queue, e.part
    from unnest(p_token, p_outcome, p_join, p_part) e(token, outcome, join_id, part)
    join jobguard.history h on h.source + 0 = p_source and h.token = e.token and h.outcome = 'completed'
        and h.token = any (p_token)
    where e.join_id is not null and e.outcome = 'completed'
      and not e.token = any (v_ended) and not e.token = any (v_unknown)
      and not jobguard.is_closed(p_source, e.join_id)
    on conflict do nothing;
  end if;

  if v_unknown <> '{}' then
    insert into jobguard.history (source, token, job_id, queue, task, outcome, number, worker,
                                  ended_at, errors)
    select distinct on (e.token) p_source, e.token, e.job_id, e.queue, e.task,
           e.outcome::jobguard.outcome, nullif(e.number, 0), e.worker,
           least(now(), greatest(to_timestamp(e.ended), now() - interval '1 hour')),
           case when e.error is not null then array[e.error] end
    from unnest(p_token, p_job_id, p_queue, p_task, p_outcome, p_number, p_worker, p_ended, p_error)
      with ordinality e(token, job_id, queue, task, outcome, number, worker, ended, error, nth)
    where e.token = any (v_unknown) order by e.token, e.nth;
    insert into jobguard.join_parts (source, join_id, job_id, token, queue, state)
    select p_source, e.join_id, e.job_id, e.token, e.queue, e.part
    from unnest(p_token, p_job_id, p_queue, p_join, p_part) e(token, job_id, queue, join_id, part)
    where e.token = any (v_unknown) and e.join_id is not null
      and not jobguard.is_closed(p_source, e.join_id)
    on conflict do nothing;
    -- The unknown delivery ran, so it had replaced an older delivery of its job id. No other
    -- process will report that one.
    with replaced as (
      delete from jobguard.jobs j
      using unnest(p_token, p_job_id) u(token, job_id)
      where (select s.one_body from jobguard.sources s where s.id = p_source) is not false
        and u.token = any (v_unknown) and j.source + 0 = p_source and j.job_id = u.job_id
        and j.token < u.token and j.token = any (v_rows)
        and not exists (select from jobguard.running r where r.source + 0 = p_source
                          and r.token = j.token and r.token = any (v_rows))
      returning j.*, u.token as next
    ), unsuspected as (
      delete from jobguard.suspects s using replaced o where s.source + 0 = p_source
        and s.token = o.token and s.token = any (v_rows)
    ), unboxed as (
      delete from jobguard.outbox b using replaced o where b.source + 0 = p_source
        and b.token = o.token and b.token = any (v_rows)
    )
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, recorded_at, next)
    select o.source, o.token, o.job_id, o.queue, o.task, 'superseded', o.attempt, o.recoveries,
           o.crashes, o.recorded_at, o.next
    from replaced o;
  end if;
  return array(
    select case when row_number() over (partition by t order by nth) > 1 then 'late'
                when t = any (v_ended) then 'ended'
                when t = any (v_unknown) then 'unknown'
                else 'late' end
    from unnest(p_token) with ordinality u(t, nth) order by nth);
end
$$;
