-- The rules of writing, each as one function, so that a record, a claim or an end is one round trip.
--
-- They are functions in plpgsql, not single statements, because in READ COMMITTED each statement
-- inside sees what was committed before it began: after waiting for a lock we must look again, and
-- one statement would look with the eyes it had before it waited.
--
-- The order of locks is the same everywhere: rows of jobs, sorted by token, before rows of running.

-- A claim is live while its worker is neither gone nor declared dead, and lists it. A worker lists a
-- claim before it asks for it, and takes a beat's list after the beat before was answered; so a claim
-- made before the beat before and not on the list is surely not held.
create function jobguard.holds(w jobguard.workers, r jobguard.running)
returns boolean language sql stable as $$
  select w.id is not null and w.left_at is null and w.dead_at is null
     and (r.token = any (w.claims) or r.claimed_at >= w.previous_beat_at)
$$;

create function jobguard.led(p_namespace text)
returns boolean language sql stable as $$
  select exists (select from jobguard.leader l where l.namespace = p_namespace and l.expires_at > now())
$$;

-- Two writers that both find nothing of a token (a late record, an end that came before it) must not
-- both go on. Rare paths only.
create function jobguard.alone_with(p_token uuid)
returns void language sql as $$
  select pg_advisory_xact_lock(hashtextextended(p_token::text, 7417))
$$;

-- Close joins in the name of what goes on from them. Returns those that come too late.
create function jobguard.close_joins(p_source bigint, p_token uuid[], p_closes text[])
returns uuid[] language plpgsql as $$
begin
  insert into jobguard.joins as x (source, id, closed_at, closed_by)
  select distinct on (f.closes) p_source, f.closes, now(), f.token
  from unnest(p_token, p_closes) with ordinality f(token, closes, nth)
  where f.closes is not null order by f.closes, f.nth
  on conflict (source, id) do update
  set closed_at = now(), closed_by = excluded.closed_by where x.closed_at is null;
  delete from jobguard.join_parts p where p.source = p_source and p.join_id = any (p_closes);
  return array(
    select f.token from unnest(p_token, p_closes) f(token, closes)
    join jobguard.joins x on x.source = p_source and x.id = f.closes
    where x.closed_by is distinct from f.token);
end
$$;

-- Record deliveries that may take the place of others. Returns the refused ones.
--
-- A delivery supersedes its parent, in the name of the claim it speaks for, and every unclaimed
-- delivery of its job id. It is refused if its parent has ended, has moved on, or is held by another.
create function jobguard.record(
  p_source bigint, p_token uuid[], p_job_id text[], p_queue text[], p_task text[], p_priority int[],
  p_attempt int[], p_due float8[], p_expires float8[], p_key text[], p_trace text[],
  p_envelope bytea[], p_parent uuid[], p_claim int[], p_outcome text[], p_speaker uuid[],
  p_fresh bool[], p_derived bool[], p_closes text[],
  p_outbox bool, p_replay bool, p_newest bool)
returns uuid[] language plpgsql as $$
declare
  v_alone   bool := (select s.one_body from jobguard.sources s where s.id = p_source);
  v_never   uuid[] := '{}';  -- of the refused: whoever holds what
  v_refused uuid[] := '{}';
  v_skipped uuid[] := '{}';
  v_over    uuid[] := '{}';  -- of these: over before they were recorded, but what they followed is not
  v_ids     text[];
  v_token   uuid;
begin
  if p_replay then
    -- Old news: what has ended since is not owed again.
    foreach v_token in array p_token loop
      perform jobguard.alone_with(v_token);
    end loop;
    v_skipped := array(select distinct h.token from jobguard.history h
                       where h.source = p_source and h.token = any (p_token));
    -- Nor is what a worker has met, and recorded without knowing what it follows.
    v_over := v_skipped || array(select j.token from jobguard.jobs j
                                 where j.source = p_source and j.token = any (p_token));
    -- A member of a join that had ended by then can be told to the library again with its envelope.
    update jobguard.join_parts p set envelope = f.envelope
    from unnest(p_token, p_envelope) f(token, envelope)
    where p.source = p_source and p.token = f.token and p.envelope = '';
    -- Older than what is owed of its id by now: it was superseded before it could be recorded. What a
    -- worker holds is the newest there is, whatever the clocks say that made the tokens.
    with later as (
      select f.token, j.token as next
      from unnest(p_token, p_job_id, p_parent) f(token, job_id, parent)
      join jobguard.jobs j on j.source = p_source and j.job_id = f.job_id and j.token > f.token
      where v_alone is not false and not p_newest and j.token is distinct from f.parent
      union all
      select f.token, h.token
      from unnest(p_token, p_job_id, p_parent) f(token, job_id, parent)
      join jobguard.history h on h.source = p_source and h.job_id = f.job_id and h.token > f.token
      where v_alone is not false and not p_newest and h.token is distinct from f.parent
    ), outdated as (
      select distinct on (f.token) f.token, f.job_id, f.queue, f.task, l.next
      from unnest(p_token, p_job_id, p_queue, p_task, p_fresh) f(token, job_id, queue, task, fresh)
      join later l on l.token = f.token
      where not f.token = any (v_skipped)
        and not exists (select from jobguard.jobs o where o.source = p_source and o.token = f.token)
      order by f.token, l.next desc
    ), tombstones as (
      insert into jobguard.history (source, token, job_id, queue, task, outcome, next)
      select p_source, o.token, o.job_id, o.queue, o.task, 'superseded', o.next from outdated o
      returning token
    )
    select v_skipped || array(select token from tombstones) into v_skipped;
  end if;
  if true = any (p_derived) then
    -- A run that was killed and started again sends once more what it had sent.
    v_never := array(select distinct h.token
                     from unnest(p_token, p_derived) f(token, derived)
                     join jobguard.history h on h.source = p_source and h.token = f.token
                     where f.derived);
  end if;
  if exists (select from unnest(p_closes) c where c is not null) then
    v_never := v_never || jobguard.close_joins(p_source, p_token, p_closes);
  end if;
  v_skipped := v_skipped || v_never;
  v_ids := array(select f.job_id from unnest(p_job_id, p_fresh) f(job_id, fresh)
                 where v_alone is not false and not f.fresh);
  -- Two deliveries of one id at one moment: neither is a row yet that the other could lock.
  perform pg_advisory_xact_lock(hashtextextended(i, p_source)) from unnest(v_ids) i order by i;
  perform from jobguard.jobs j
  where j.source = p_source and (j.token = any (p_parent) or j.job_id = any (v_ids))
  order by j.token for update;
  if not found and not exists (select from unnest(p_parent) p where p is not null) then
    -- Nothing stands in the way of any of them, which is what nearly always happens.
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
    return case when p_replay then '{}' else v_never end;
  end if;

  v_refused := array(
    select f.token
    from unnest(p_token, p_parent, p_claim, p_speaker) f(token, parent, claim, speaker)
    left join jobguard.jobs j on j.source = p_source and j.token = f.parent
    left join jobguard.running r on r.source = p_source and r.token = f.parent
    left join jobguard.workers w on w.id = r.worker
    where f.parent is not null
      and case
        -- Of old news, which is in Redis already: a claim that was taken away, and given to nobody since,
        -- still speaks for its run.
        when j.token is not null and f.claim is not null then
          coalesce(r.number, case when p_replay then j.claims end) is distinct from f.claim
        -- Started while Postgres was away, and perhaps claimed since, by the very one who speaks.
        when j.token is not null then
          r.token is not null and jobguard.holds(w, r) and r.worker is distinct from f.speaker
        else exists (select from jobguard.history h
                     where h.source = p_source and h.token = f.parent
                       and h.next is distinct from f.token)
      end);
  v_skipped := v_skipped || v_refused || array(
    select j.token from jobguard.jobs j where j.source = p_source and j.token = any (p_token));

  with added as (
    select f.*, f.token = any (v_over) as over
    from unnest(p_token, p_job_id, p_queue, p_task, p_parent, p_outcome, p_fresh)
      f(token, job_id, queue, task, parent, outcome, fresh)
    where not f.token = any (v_skipped) or (f.token = any (v_over) and not f.token = any (v_refused))
  ), named as (
    select j.token, a.token as next, a.outcome::jobguard.outcome as outcome, 1 as rank
    from added a
    join jobguard.jobs j on j.source = p_source and j.token = a.parent
    union all
    select j.token, a.token, 'superseded', 2
    from added a
    join jobguard.jobs j on j.source = p_source and j.job_id = a.job_id and j.token <> a.token
    where not a.fresh and j.job_id = any (v_ids) and (j.token < a.token or not a.over)
      and not exists (select from jobguard.running r where r.source = p_source and r.token = j.token)
  ), old as (
    select distinct on (n.token) n.token, n.next, n.outcome from named n
    order by n.token, n.rank, n.next desc
  ), gone as (
    delete from jobguard.jobs j using old o where j.source = p_source and j.token = o.token
    returning j.*, o.next, o.outcome
  ), unclaimed as (
    delete from jobguard.running r using old o where r.source = p_source and r.token = o.token
    returning r.token, r.number, r.worker, r.claimed_at
  ), unsuspected as (
    delete from jobguard.suspects s using old o where s.source = p_source and s.token = o.token
  ), unboxed as (
    delete from jobguard.outbox b using old o where b.source = p_source and b.token = o.token
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, next)
    select g.source, g.token, g.job_id, g.queue, g.task, g.outcome, g.attempt, g.recoveries,
           g.crashes, u.number, u.worker, g.recorded_at, u.claimed_at, g.next
    from gone g left join unclaimed u on u.token = g.token
  ), unknown as (
    -- The predecessor was recorded by nobody (it waits in a spool): it must not be owed when it comes.
    insert into jobguard.history (source, token, job_id, queue, task, outcome, next)
    select p_source, a.parent, a.job_id, a.queue, a.task, a.outcome::jobguard.outcome, a.token
    from added a
    where a.parent is not null
      and not exists (select from old o where o.token = a.parent)
      and not exists (select from jobguard.history h where h.source = p_source and h.token = a.parent)
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
  return array(select r from unnest(v_refused) r where not r = any (v_over))
      || case when p_replay then '{}' else v_never end;
end
$$;

-- Grant a start its claim, or say why not.
create function jobguard.claim(
  p_source bigint, p_token uuid, p_nonce uuid, p_worker uuid, p_pid int, p_namespace text,
  p_timeout float8, p_budget int,
  out verdict text, out number int, out crashes int, out outcome jobguard.outcome)
language plpgsql as $$
declare
  v_job    record;
  v_held   record;
  v_silent boolean;
  v_dead   boolean;
begin
  -- A claim that is lost with a crash of Postgres is a start nobody remembers: the fence is then
  -- one restart weaker, as it is while Postgres is away. It is not worth a flush per start.
  perform set_config('synchronous_commit', 'off', true);
  select j.claims, j.crashes, j.job_id, j.queue, j.task into v_job
  from jobguard.jobs j where j.source = p_source and j.token = p_token for no key update;
  if not found then
    select h.outcome into outcome from jobguard.history h
    where h.source = p_source and h.token = p_token order by h.ended_at limit 1;
    verdict := case when found then 'ended' else 'unknown' end;
    return;
  end if;
  crashes := v_job.crashes;
  v_dead := exists (select from jobguard.workers w where w.id = p_worker and w.dead_at is not null);
  if not v_dead then
    insert into jobguard.running as r (source, token, number, nonce, worker, pid)
    values (p_source, p_token, v_job.claims + 1, p_nonce, p_worker, p_pid)
    on conflict do nothing returning r.number into number;
    if found then
      verdict := 'granted';
      return;
    end if;
  end if;

  select r.number, r.nonce, w.left_at, jobguard.holds(w, r) as held,
         coalesce(w.beat_at < now() - make_interval(secs => p_timeout), true) as silent
  into v_held
  from jobguard.running r left join jobguard.workers w on w.id = r.worker
  where r.source = p_source and r.token = p_token;
  number := v_held.number;
  if v_held.nonce = p_nonce and not v_dead then
    -- Whoever asks again may have been declared dead since, and have another name.
    update jobguard.running r set worker = p_worker, claimed_at = now()
    where r.source = p_source and r.token = p_token and r.worker <> p_worker;
    verdict := 'granted';
    return;
  end if;
  if v_held.held and (jobguard.led(p_namespace) or not v_held.silent) then
    if v_held.silent then
      -- After this skip the record may be the only copy: the leader shall look as soon as it can judge.
      insert into jobguard.suspects (source, token, cause) values (p_source, p_token, 'worker')
      on conflict do nothing;
    end if;
    verdict := 'held';
    return;
  end if;
  if v_dead then
    verdict := 'disowned';
    return;
  end if;

  if v_held.left_at is null then
    crashes := crashes + 1;
  end if;
  if crashes > p_budget then
    with gone as (
      delete from jobguard.jobs j where j.source = p_source and j.token = p_token returning j.*
    ), unclaimed as (
      delete from jobguard.running r where r.source = p_source and r.token = p_token returning r.*
    )
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, errors, envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, 'dead', g.attempt, g.recoveries,
           claim.crashes, u.number, u.worker, g.recorded_at, u.claimed_at,
           array[format('%s workers died while they ran this job', claim.crashes)], g.envelope
    from gone g left join unclaimed u on true;
    delete from jobguard.suspects s where s.source = p_source and s.token = p_token;
    delete from jobguard.outbox b where b.source = p_source and b.token = p_token;
    verdict := 'spent';
    return;
  end if;
  if crashes <> v_job.crashes then
    update jobguard.jobs j set crashes = claim.crashes where j.source = p_source and j.token = p_token;
  end if;
  update jobguard.running r
  set number = r.number + 1, nonce = p_nonce, worker = p_worker, pid = p_pid, claimed_at = now(),
      execution = null, returned_at = null, heartbeat_at = null, progress = null, attrs = null
  where r.source = p_source and r.token = p_token returning r.number into number;
  verdict := 'granted';
end
$$;

create function jobguard.is_closed(p_source bigint, p_join text)
returns boolean language sql stable as $$
  select exists (select from jobguard.joins x
                 where x.source = p_source and x.id = p_join and x.closed_at is not null)
$$;

-- A worker cannot begin a delivery (it has no such task): back after a while, or dead in the end.
-- Returns how many times are left.
create function jobguard.decline(p_source bigint, p_token uuid, p_most int, p_wait float8, p_error text)
returns integer language plpgsql as $$
declare
  v_declined int;
begin
  update jobguard.jobs j
  set declined = j.declined + 1, not_before = now() + make_interval(secs => p_wait * 2 ^ j.declined)
  where j.source = p_source and j.token = p_token
    and not exists (select from jobguard.running r where r.source = p_source and r.token = p_token)
  returning j.declined into v_declined;
  if v_declined is null then
    return 0;
  end if;
  if v_declined <= p_most then
    insert into jobguard.suspects as s (source, token, cause) values (p_source, p_token, 'worker')
    on conflict (source, token) do update set cause = 'worker', mark = '', seen_at = now();
    return p_most - v_declined;
  end if;
  with gone as (
    delete from jobguard.jobs j where j.source = p_source and j.token = p_token returning j.*
  )
  insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                crashes, recorded_at, errors, envelope)
  select g.source, g.token, g.job_id, g.queue, g.task, 'dead', g.attempt, g.recoveries, g.crashes,
         g.recorded_at, array[p_error], g.envelope
  from gone g;
  delete from jobguard.suspects s where s.source = p_source and s.token = p_token;
  delete from jobguard.outbox b where b.source = p_source and b.token = p_token;
  return 0;
end
$$;

-- End deliveries in the name of their claims. One answer each: ended, late or unknown.
create function jobguard.end(
  p_source bigint, p_token uuid[], p_number int[], p_outcome text[], p_worker uuid[],
  p_ended float8[], p_job_id text[], p_queue text[], p_task text[], p_error text[],
  p_join text[], p_part bytea[])
returns text[] language plpgsql as $$
declare
  v_open    uuid[] := p_token;
  v_ended   uuid[] := '{}';
  v_unknown uuid[] := '{}';
  v_looked  uuid[] := '{}';
  v_token   uuid;
begin
loop
  perform from jobguard.jobs j
  where j.source = p_source and j.token = any (v_open) order by j.token for update;
  with said as (
    select distinct on (e.token) e.*
    from unnest(p_token, p_number, p_outcome, p_worker, p_ended, p_error, p_join, p_part)
      with ordinality e(token, number, outcome, worker, ended, error, join_id, part, nth)
    where e.token = any (v_open)
    order by e.token, e.nth
  ), valid as (
    -- A stale number changes nothing; but what completed has completed, where nobody else runs it now.
    select s.*, r.claimed_at
    from said s
    join jobguard.jobs j on j.source = p_source and j.token = s.token
    left join jobguard.running r on r.source = p_source and r.token = s.token
    where r.number = s.number
       or (r.token is null and (s.outcome = 'completed' or s.number = 0))
       or (s.number = 0 and r.worker = s.worker)
  ), gone as (
    delete from jobguard.jobs j using valid v where j.source = p_source and j.token = v.token
    returning j.*, v.number, v.outcome, v.worker, v.ended, v.error, v.claimed_at, v.join_id, v.part
  ), parts as (
    insert into jobguard.join_parts (source, join_id, job_id, token, queue, state, envelope)
    select g.source, g.join_id, g.job_id, g.token, g.queue, g.part, g.envelope from gone g
    where g.join_id is not null and not jobguard.is_closed(p_source, g.join_id)
    on conflict do nothing
  ), unclaimed as (
    delete from jobguard.running r using valid v where r.source = p_source and r.token = v.token
  ), unsuspected as (
    delete from jobguard.suspects s using valid v where s.source = p_source and s.token = v.token
  ), unboxed as (
    delete from jobguard.outbox b using valid v where b.source = p_source and b.token = v.token
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, ended_at, errors,
                                  envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, g.outcome::jobguard.outcome, g.attempt,
           g.recoveries, g.crashes, g.number, g.worker, g.recorded_at, g.claimed_at,
           -- The worker's clock, as far as it can be believed: retention goes by it.
           least(now(), greatest(to_timestamp(g.ended), now() - interval '1 hour')),
           case when g.error is not null then array[g.error] end,
           case when g.outcome in ('failed', 'dead') then g.envelope end
    from gone g returning token
  )
  select v_ended || array(select token from tombstones) into v_ended;

  v_open := '{}';
  if cardinality(v_ended) < cardinality(p_token) then
    foreach v_token in array p_token loop
      continue when v_token = any (v_ended) or v_token = any (v_looked);
      v_looked := v_looked || v_token;
      perform jobguard.alone_with(v_token);
      if exists (select from jobguard.jobs j where j.source = p_source and j.token = v_token) then
        -- Its number is stale; or it was recorded while we waited, and then it ends like any other.
        v_open := v_open || v_token;
      elsif not exists (select from jobguard.history h
                        where h.source = p_source and h.token = v_token) then
        v_unknown := v_unknown || v_token;
      end if;
    end loop;
  end if;
  exit when v_open = '{}';
end loop;

  -- What completed as the library shows it, or as another said, has still left something to its join.
  insert into jobguard.join_parts (source, join_id, job_id, token, queue, state)
  select distinct on (e.join_id, h.job_id) p_source, e.join_id, h.job_id, e.token, h.queue, e.part
  from unnest(p_token, p_outcome, p_join, p_part) e(token, outcome, join_id, part)
  join jobguard.history h on h.source = p_source and h.token = e.token and h.outcome = 'completed'
  where e.join_id is not null and e.outcome = 'completed'
    and not e.token = any (v_ended) and not e.token = any (v_unknown)
    and not jobguard.is_closed(p_source, e.join_id)
  on conflict do nothing;

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
    -- It ran, so it stood where an older delivery of its id had stood, of which nobody else will tell.
    with replaced as (
      delete from jobguard.jobs j
      using unnest(p_token, p_job_id) u(token, job_id)
      where (select s.one_body from jobguard.sources s where s.id = p_source) is not false
        and u.token = any (v_unknown) and j.source = p_source and j.job_id = u.job_id
        and j.token < u.token
        and not exists (select from jobguard.running r where r.source = j.source and r.token = j.token)
      returning j.*, u.token as next
    ), unsuspected as (
      delete from jobguard.suspects s using replaced o where s.source = o.source and s.token = o.token
    ), unboxed as (
      delete from jobguard.outbox b using replaced o where b.source = o.source and b.token = o.token
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

-- Write tombstones for what is cancelled, claimed or not; for a whole queue: what is not claimed.
-- Returns how many were owed.
--
-- An id or a queue means what stood there when the cancel was meant, p_meant by our clock: what has been
-- recorded since is a new life, however long a lock, a spool or a network has kept the cancel. What the
-- canceller itself made later is left out by its token, which sorts behind p_until. What waited in its
-- spool then, p_waiting, was sent before, however late it is recorded. A token means its delivery,
-- whenever that comes.
create function jobguard.cancel(
  p_source bigint, p_token uuid[], p_job_id text[], p_queue text,
  p_meant timestamptz, p_until uuid, p_waiting uuid[])
returns integer language plpgsql as $$
declare
  v_owed integer;
begin
  -- What runs is locked with the rest of its queue: by the next look it may have been given back.
  perform from jobguard.jobs j
  where j.source = p_source
    and (j.token = any (p_token)
         or ((j.job_id = any (p_job_id) or j.queue = p_queue)
             and (j.token = any (p_waiting)
                  or (j.recorded_at <= p_meant and (p_until is null or j.token <= p_until)))))
  order by j.token for update;
  with gone as (
    delete from jobguard.jobs j
    where j.source = p_source
      and (j.token = any (p_token)
           or ((j.job_id = any (p_job_id)
                or (j.queue = p_queue and not exists (
                      select from jobguard.running r where r.source = p_source and r.token = j.token)))
               and (j.token = any (p_waiting)
                    or (j.recorded_at <= p_meant and (p_until is null or j.token <= p_until)))))
    returning j.*
  ), unclaimed as (
    delete from jobguard.running r using gone g where r.source = p_source and r.token = g.token
    returning r.token, r.number, r.worker, r.claimed_at
  ), unsuspected as (
    delete from jobguard.suspects s using gone g where s.source = p_source and s.token = g.token
  ), unboxed as (
    delete from jobguard.outbox b using gone g where b.source = p_source and b.token = g.token
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at)
    select g.source, g.token, g.job_id, g.queue, g.task, 'cancelled', g.attempt, g.recoveries,
           g.crashes, u.number, u.worker, g.recorded_at, u.claimed_at
    from gone g left join unclaimed u on u.token = g.token
    returning token
  )
  select count(*) into v_owed from tombstones;
  -- Of a token nobody knows yet (its record waits in a spool), the tombstone comes first.
  insert into jobguard.history (source, token, job_id, queue, task, outcome)
  select distinct p_source, t, '', '', '', 'cancelled'::jobguard.outcome
  from unnest(p_token) t
  where not exists (select from jobguard.history h where h.source = p_source and h.token = t)
    and not exists (select from jobguard.jobs j where j.source = p_source and j.token = t);
  return v_owed;
end
$$;
