-- Statements whose cost depends on what they return, not on what the tables hold.

-- Suspects whose absence was reported are inspected first, also while a million others wait.
create index suspects_reported on jobguard.suspects (token) where cause = 'worker' and mark = '';

-- Return these deliveries, as far as they are owed, as the leader inspects them. p_outbox: a delivery whose
-- push was left to the leader has the cause 'push'.
--
-- The rows of the other tables are found by the keys of these deliveries, one by one ("offset 0" keeps the
-- planner from joining whole tables): a merge with all claims took 100 times as long.
create function jobguard.owed(p_source bigint, p_tokens uuid[], p_outbox bool)
returns table (
  token uuid, job_id text, queue text, task text, age float8, due_in float8, expired bool,
  crashes smallint, recoveries smallint, claims integer, backoff float8, number integer, worker uuid,
  live bool, announced bool, cause text, suspected_for float8, mark text, unsent bool)
language sql stable as $$
select j.token, j.job_id, j.queue, j.task, extract(epoch from now() - j.recorded_at)::float8,
       coalesce(extract(epoch from j.due_at - now()), 0)::float8,
       coalesce(j.expires_at <= now(), false), j.crashes, j.recoveries, j.claims,
       coalesce(extract(epoch from j.not_before - now()), 0)::float8,
       r.number, r.worker,
       r.token is not null and coalesce(jobguard.holds((w.*)::jobguard.workers, (r.*)::jobguard.running), false),
       coalesce(w.left_at is not null, false),
       coalesce(s.cause::text, case when o.created_at is not null then 'push' end),
       coalesce(extract(epoch from now() - coalesce(s.seen_at, o.created_at)), 0)::float8,
       coalesce(s.mark, ''), coalesce(o.unsent, false)
from jobguard.jobs j
left join lateral (
  select * from jobguard.running r where r.token = j.token and r.source = p_source offset 0
) r on true
left join lateral (select * from jobguard.workers w where w.id = r.worker offset 0) w on true
left join lateral (
  select s.cause, s.seen_at, s.mark from jobguard.suspects s
  where s.token = j.token and s.source = p_source offset 0
) s on true
left join lateral (
  select o.created_at, o.unsent from jobguard.outbox o
  where p_outbox and o.token = j.token and o.source = p_source offset 0
) o on true
where j.source + 0 = p_source and j.token = any (p_tokens)
order by j.token
$$;

-- Write tombstones for cancelled deliveries; see 0002. No two large sets are joined: a queue may hold a
-- million deliveries, and no statistics say so.
create or replace function jobguard.cancel(
  p_source bigint, p_token uuid[], p_job_id text[], p_queue text,
  p_meant timestamptz, p_until uuid, p_waiting uuid[])
returns integer language plpgsql as $$
declare
  v_owed    integer;
  v_rows    uuid[];
  v_running uuid[];
begin
  -- Running deliveries are locked with the rest of their queue: at the next query their claims may
  -- have been released.
  v_rows := p_token || jobguard.meant(p_source, p_job_id, p_queue, p_meant, p_until, p_waiting);
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_rows)
  order by j.token for update;
  v_rows := array(select unnest(v_rows) union
                  select unnest(jobguard.meant(p_source, p_job_id, p_queue, p_meant, p_until, p_waiting)));
  v_running := array(select r.token from jobguard.running r
                     where r.source + 0 = p_source and r.token = any (v_rows));
  if p_queue is not null and v_running <> '{}' then
    -- Of a queue, what runs goes on; what is named by a token or a job id is cancelled in any case.
    v_rows := array(
      select unnest(v_rows)
      except
      select j.token from jobguard.jobs j
      where j.source + 0 = p_source and j.token = any (v_running)
        and not (j.token = any (p_token) or j.job_id = any (p_job_id)));
  end if;
  with gone as (
    delete from jobguard.jobs j where j.source + 0 = p_source and j.token = any (v_rows)
    returning j.*
  ), unclaimed as (
    delete from jobguard.running r
    where r.source + 0 = p_source and r.token = any (array(select token from gone))
    returning r.token, r.number, r.worker, r.claimed_at
  ), unsuspected as (
    delete from jobguard.suspects s
    where s.source + 0 = p_source and s.token = any (array(select token from gone))
  ), unboxed as (
    delete from jobguard.outbox b
    where b.source + 0 = p_source and b.token = any (array(select token from gone))
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at)
    select g.source, g.token, g.job_id, g.queue, g.task, 'cancelled', g.attempt, g.recoveries,
           g.crashes, u.number, u.worker, g.recorded_at, u.claimed_at
    from gone g left join unclaimed u on u.token = g.token
    returning token
  )
  select count(*) into v_owed from tombstones;
  -- If a token is not known yet (its record waits in a spool), the tombstone comes first.
  insert into jobguard.history (source, token, job_id, queue, task, outcome)
  select distinct p_source, t, '', '', '', 'cancelled'::jobguard.outcome
  from unnest(p_token) t
  where not exists (select from jobguard.history h where h.source + 0 = p_source
                      and h.token = t and h.token = any (p_token))
    and not exists (select from jobguard.jobs j where j.source + 0 = p_source
                      and j.token = t and j.token = any (p_token));
  return v_owed;
end
$$;
