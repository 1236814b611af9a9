-- Let the retry of a run without a claim supersede its delivery also while another worker has the claim.
--
-- A worker that claims a job and dies in an outage of PostgreSQL is not known to be dead when the reports of
-- that outage are written. If a second worker ran the job in the outage, and it failed there, its retry was
-- refused, and the job was restored beside it when the first worker was declared dead.

-- Record deliveries that may supersede others; see 0002 and 0003.
create or replace function jobguard.record(
  p_source bigint, p_token uuid[], p_job_id text[], p_queue text[], p_task text[], p_priority int[],
  p_attempt int[], p_due float8[], p_expires float8[], p_key text[], p_trace text[],
  p_envelope bytea[], p_parent uuid[], p_claim int[], p_outcome text[], p_speaker uuid[],
  p_fresh bool[], p_derived bool[], p_closes text[],
  p_outbox bool, p_replay bool, p_newest bool, p_error text[] default null)
returns uuid[] language plpgsql as $$
declare
  v_alone   bool := (select s.one_body from jobguard.sources s where s.id = p_source);
  v_never   uuid[] := '{}';  -- refused deliveries, whether or not another worker has a claim
  v_refused uuid[] := '{}';
  v_skipped uuid[] := '{}';
  v_over    uuid[] := '{}';  -- of the skipped: known or ended before this call, while their parent may still be owed
  v_ids     text[];
  v_rows    uuid[];
  v_stands  bool;
begin
  if p_replay then
    -- Old deliveries: a delivery that has ended since is not owed again.
    perform jobguard.alone_with(p_token);
    v_skipped := array(select distinct h.token from jobguard.history h
                       where h.source + 0 = p_source and h.token = any (p_token));
    -- Nor is a delivery that a worker has started, and recorded without knowing its parent.
    v_over := v_skipped || array(select j.token from jobguard.jobs j
                                 where j.source + 0 = p_source and j.token = any (p_token));
    -- The envelope is needed to report to the library again a member of a join that had ended
    -- before.
    update jobguard.join_parts p set envelope = f.envelope
    from unnest(p_token, p_envelope) f(token, envelope)
    where p.source = p_source and p.token = f.token and p.envelope = '';
    -- These are older than a delivery of the same job id that is owed now, so they were superseded
    -- before they could be recorded. A delivery that a worker has is the newest one (p_newest), even if its
    -- token comes from a slower clock.
    with namesakes as materialized (
      select f.token, f.parent, j.token as next
      from unnest(p_token, p_job_id, p_parent) f(token, job_id, parent)
      join jobguard.jobs j on j.source + 0 = p_source and j.job_id = f.job_id and j.job_id = any (p_job_id)
      where v_alone is not false and not p_newest
      union all
      select f.token, f.parent, h.token
      from unnest(p_token, p_job_id, p_parent) f(token, job_id, parent)
      join jobguard.history h on h.source + 0 = p_source and h.job_id = f.job_id and h.job_id = any (p_job_id)
      where v_alone is not false and not p_newest
    ), later as (
      select n.token, n.next from namesakes n
      where n.next > n.token and n.next is distinct from n.parent
    ), outdated as (
      select distinct on (f.token) f.token, f.job_id, f.queue, f.task, l.next
      from unnest(p_token, p_job_id, p_queue, p_task, p_fresh) f(token, job_id, queue, task, fresh)
      join later l on l.token = f.token
      where not f.token = any (v_skipped)
        and not exists (select from jobguard.jobs o where o.source + 0 = p_source
                         and o.token = f.token and o.token = any (p_token))
      order by f.token, l.next desc
    ), tombstones as (
      insert into jobguard.history (source, token, job_id, queue, task, outcome, next)
      select p_source, o.token, o.job_id, o.queue, o.task, 'superseded', o.next from outdated o
      returning token
    )
    select v_skipped || array(select token from tombstones) into v_skipped;
  end if;
  if true = any (p_derived) then
    -- A run that was killed and started again sends its messages a second time.
    v_never := array(select distinct h.token
                     from unnest(p_token, p_derived) f(token, derived)
                     join jobguard.history h on h.source + 0 = p_source and h.token = f.token
                       and h.token = any (p_token)
                     where f.derived);
  end if;
  v_ids := array(select f.job_id from unnest(p_job_id, p_fresh) f(job_id, fresh)
                 where v_alone is not false and not f.fresh);
  -- Two deliveries of one job id at the same moment: neither has a row yet that the other could
  -- lock.
  perform pg_advisory_xact_lock(hashtextextended(i, p_source)) from unnest(v_ids) i order by i;
  v_rows := p_parent || array(select j.token from jobguard.jobs j
                              where j.source + 0 = p_source and j.job_id = any (v_ids));
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_rows) order by j.token for update;
  v_stands := found;
  -- Joins come after jobs, as in jobguard.end.
  if exists (select from unnest(p_closes) c where c is not null) then
    v_never := v_never || jobguard.close_joins(p_source, p_token, p_closes);
  end if;
  v_skipped := v_skipped || v_never;
  if not v_stands and not exists (select from unnest(p_parent) p where p is not null) then
    -- No other delivery is concerned, which is nearly always the case.
    insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                               expires_at, key, trace, envelope)
    select p_source, f.token, f.job_id, f.queue, f.task, f.priority, f.attempt,
           to_timestamp(f.due), to_timestamp(f.expires), f.key, f.trace, f.envelope
    from unnest(p_token, p_job_id, p_queue, p_task, p_priority, p_attempt, p_due, p_expires, p_key,
                p_trace, p_envelope)
      f(token, job_id, queue, task, priority, attempt, due, expires, key, trace, envelope)
    where not f.token = any (v_skipped)
    on conflict do nothing;
    if p_outbox then
      insert into jobguard.outbox (source, token, unsent)
      select p_source, t, true from unnest(p_token) t where not t = any (v_skipped)
      on conflict do nothing;
    end if;
    if p_replay then
      -- An insert waits for an end that deletes the same row. That end has committed its tombstone by now.
      delete from jobguard.jobs j using jobguard.history h
      where j.source + 0 = p_source and j.token = any (p_token)
        and h.source + 0 = p_source and h.token = j.token and h.token = any (p_token);
    end if;
    return case when p_replay then '{}' else v_never end;
  end if;

  v_refused := array(
    select f.token
    from unnest(p_token, p_parent, p_claim, p_speaker) f(token, parent, claim, speaker)
    left join jobguard.jobs j on j.source + 0 = p_source and j.token = f.parent
      and j.token = any (p_parent)
    left join jobguard.running r on r.source + 0 = p_source and r.token = f.parent
      and r.token = any (p_parent)
    left join jobguard.workers w on w.id = r.worker
    where f.parent is not null
      and case
        -- With p_replay the delivery is in Redis already: a claim that was removed, and granted to
        -- no other worker since, still counts for its run.
        when j.token is not null and f.claim is not null then
          coalesce(r.number, case when p_replay then j.claims end) is distinct from f.claim
        -- The run started while PostgreSQL was away; perhaps the same worker has claimed it since. With
        -- p_replay its retry is in Redis already, and the worker that has the claim is probably dead.
        when j.token is not null then
          r.token is not null and jobguard.holds(w, r) and r.worker is distinct from f.speaker
          and not (p_replay and f.speaker is not null)
        else exists (select from jobguard.history h
                     where h.source + 0 = p_source and h.token = f.parent
                       and h.next is distinct from f.token)
      end);
  v_skipped := v_skipped || v_refused || array(
    select j.token from jobguard.jobs j where j.source + 0 = p_source and j.token = any (p_token));

  with added as (
    select f.*, f.token = any (v_over) as over
    from unnest(p_token, p_job_id, p_queue, p_task, p_parent, p_outcome, p_fresh, p_error)
      f(token, job_id, queue, task, parent, outcome, fresh, error)
    where not f.token = any (v_skipped) or (f.token = any (v_over) and not f.token = any (v_refused))
  ), named as (
    select j.token, a.token as next, a.outcome::jobguard.outcome as outcome, a.error, 1 as rank
    from added a
    join jobguard.jobs j on j.source + 0 = p_source and j.token = a.parent and j.token = any (v_rows)
    union all
    select j.token, a.token, 'superseded', null, 2
    from added a
    join jobguard.jobs j on j.source + 0 = p_source and j.job_id = a.job_id and j.token <> a.token
      and j.token = any (v_rows)
    where not a.fresh and j.job_id = any (v_ids) and (j.token < a.token or not a.over)
      and not exists (select from jobguard.running r where r.source + 0 = p_source
                        and r.token = j.token and r.token = any (v_rows))
  ), old as (
    select distinct on (n.token) n.token, n.next, n.outcome, n.error from named n
    order by n.token, n.rank, n.next desc
  ), gone as (
    delete from jobguard.jobs j using old o where j.source + 0 = p_source and j.token = o.token
      and j.token = any (v_rows)
    returning j.*, o.next, o.outcome, o.error
  ), unclaimed as (
    delete from jobguard.running r using old o where r.source + 0 = p_source and r.token = o.token
      and r.token = any (v_rows)
    returning r.token, r.number, r.worker, r.claimed_at
  ), unsuspected as (
    delete from jobguard.suspects s using old o where s.source + 0 = p_source and s.token = o.token
      and s.token = any (v_rows)
  ), unboxed as (
    delete from jobguard.outbox b using old o where b.source + 0 = p_source and b.token = o.token
      and b.token = any (v_rows)
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, next, errors)
    select g.source, g.token, g.job_id, g.queue, g.task, g.outcome, g.attempt, g.recoveries,
           g.crashes, u.number, u.worker, g.recorded_at, u.claimed_at, g.next,
           case when g.error is not null then array[g.error] end
    from gone g left join unclaimed u on u.token = g.token
  ), unknown as (
    -- The parent has not been recorded yet (it waits in a spool): it must not be owed when it
    -- arrives.
    insert into jobguard.history (source, token, job_id, queue, task, outcome, next, errors)
    select p_source, a.parent, a.job_id, a.queue, a.task, a.outcome::jobguard.outcome, a.token,
           case when a.error is not null then array[a.error] end
    from added a
    where a.parent is not null
      and not exists (select from old o where o.token = a.parent)
      and not exists (select from jobguard.history h where h.source + 0 = p_source
                        and h.token = a.parent and h.token = any (p_parent))
  )
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, recoveries,
                             crashes, due_at, expires_at, key, trace, envelope)
  select p_source, f.token, f.job_id, f.queue, f.task, f.priority, f.attempt,
         coalesce(c.recoveries, 0), coalesce(c.crashes, 0),
         to_timestamp(f.due), to_timestamp(f.expires), f.key, f.trace, f.envelope
  from unnest(p_token, p_job_id, p_queue, p_task, p_priority, p_attempt, p_due, p_expires, p_key,
              p_trace, p_envelope)
    f(token, job_id, queue, task, priority, attempt, due, expires, key, trace, envelope)
  left join lateral (
    select max(g.recoveries) as recoveries, max(g.crashes) as crashes from gone g where g.next = f.token
  ) c on true
  where not f.token = any (v_skipped)
  on conflict do nothing;

  if p_outbox then
    insert into jobguard.outbox (source, token, unsent)
    select p_source, t, true from unnest(p_token) t where not t = any (v_skipped)
    on conflict do nothing;
  end if;
  if p_replay then
    -- An insert waits for an end that deletes the same row. That end has committed its tombstone by now.
    delete from jobguard.jobs j using jobguard.history h
    where j.source + 0 = p_source and j.token = any (p_token)
      and h.source + 0 = p_source and h.token = j.token and h.token = any (p_token);
  end if;
  return array(select r from unnest(v_refused) r where not r = any (v_over))
      || case when p_replay then '{}' else v_never end;
end
$$;
