-- Ids of any length, plans that do not depend on old statistics, and a retention for each
-- namespace.
--
-- Each index begins with the column that selects. If statistics were taken from an empty table, a
-- scan of a whole index looks as cheap as a search for one row, and it is not cheap when the table
-- is full again. So no index begins with source. Statements that find rows by job id, or by the
-- tokens of a join, use "source + 0", which no index can serve. A join by token comes with "token =
-- any (…)", which every use of the index by token must apply.
--
-- All tables are locked first, in the order in which the statements lock them, and only for a
-- moment: behind a long reader (a backup) every host would wait together with this migration. In
-- that case the migration fails, and can be run again.
create function jobguard.lock_for_migration()
returns void language plpgsql set lock_timeout = '3s' as $$
begin
  lock table jobguard.jobs, jobguard.running, jobguard.suspects, jobguard.outbox, jobguard.history,
             jobguard.joins, jobguard.join_parts, jobguard.queues, jobguard.leader
  in access exclusive mode;
end
$$;
select jobguard.lock_for_migration();
drop function jobguard.lock_for_migration();

alter table jobguard.jobs drop constraint jobs_pkey, add primary key (token, source);
alter table jobguard.running drop constraint running_pkey, add primary key (token, source);
alter table jobguard.suspects drop constraint suspects_pkey, add primary key (token, source);
alter table jobguard.outbox drop constraint outbox_pkey, add primary key (token, source);

-- A btree holds at most 2,704 bytes per row; a hash index holds a hash, for ids of any length.
drop index jobguard.jobs_job_id;
create index jobs_by_job on jobguard.jobs using hash (job_id);
drop index jobguard.history_job_id;
create index history_by_job on jobguard.history using hash (job_id);

drop index jobguard.history_token;
create index history_by_token on jobguard.history (token);
create index running_by_worker on jobguard.running (worker);

-- Names that are keys. The store replaces a long name by its hash; this column holds it in full.
alter table jobguard.queues add column name text;
alter table jobguard.joins add column name text;
comment on column jobguard.queues.name is 'the queue, where queue is the short form of a long name';
comment on column jobguard.joins.name is 'the join, where id is the short form of a long name';

alter table jobguard.join_parts
  drop constraint join_parts_pkey,
  add column member bigint generated always as (hashtextextended(job_id, 0)) stored,
  add primary key (source, join_id, member);
create index join_parts_bare on jobguard.join_parts (token) where envelope = '';

alter table jobguard.leader add column retention interval;
comment on column jobguard.leader.retention is 'how long this namespace wants ended deliveries remembered';

-- Take the locks of several tokens in the order of the tokens, for callers with any order.
create function jobguard.alone_with(p_token uuid[])
returns void language plpgsql as $$
declare
  v_token uuid;
begin
  for v_token in select distinct t from unnest(p_token) t order by t loop
    perform jobguard.alone_with(v_token);
  end loop;
end
$$;

-- Record deliveries that may supersede others; see 0002. p_error: why the parent's run failed.
drop function jobguard.record(
  bigint, uuid[], text[], text[], text[], int[], int[], float8[], float8[], text[], text[], bytea[],
  uuid[], int[], text[], uuid[], bool[], bool[], text[], bool, bool, bool);
create function jobguard.record(
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
      join jobguard.jobs j on j.source + 0 = p_source and j.job_id = f.job_id
      where v_alone is not false and not p_newest
      union all
      select f.token, f.parent, h.token
      from unnest(p_token, p_job_id, p_parent) f(token, job_id, parent)
      join jobguard.history h on h.source + 0 = p_source and h.job_id = f.job_id
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
        -- The run started while PostgreSQL was away; perhaps the same worker has claimed it since.
        when j.token is not null then
          r.token is not null and jobguard.holds(w, r) and r.worker is distinct from f.speaker
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

-- Grant a claim, or return why not; see 0002. A claim that is taken over from another worker waits
-- for the disk.
create or replace function jobguard.claim(
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
  select j.claims, j.crashes, j.job_id, j.queue, j.task into v_job
  from jobguard.jobs j where j.source + 0 = p_source and j.token = p_token for no key update;
  if not found then
    select h.outcome into outcome from jobguard.history h
    where h.source + 0 = p_source and h.token = p_token order by h.ended_at limit 1;
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
      -- A first claim does not wait for the disk: after a crash of PostgreSQL this start is
      -- unknown, like the starts made while PostgreSQL is away. It does wait if a takeover is part
      -- of this transaction.
      if coalesce(current_setting('jobguard.commit', true), '') = '' then
        perform set_config('jobguard.commit', current_setting('synchronous_commit'), true);
        perform set_config('synchronous_commit', 'off', true);
      end if;
      verdict := 'granted';
      return;
    end if;
  end if;

  select r.number, r.nonce, w.left_at, jobguard.holds(w, r) as held,
         coalesce(w.beat_at < now() - make_interval(secs => p_timeout), true) as silent
  into v_held
  from jobguard.running r left join jobguard.workers w on w.id = r.worker
  where r.source + 0 = p_source and r.token = p_token;
  number := v_held.number;
  if v_held.nonce = p_nonce and not v_dead then
    -- The worker that asks again may have been declared dead since, and have a new id.
    update jobguard.running r set worker = p_worker, claimed_at = now()
    where r.source + 0 = p_source and r.token = p_token and r.worker <> p_worker;
    verdict := 'granted';
    return;
  end if;
  if v_held.held and (jobguard.led(p_namespace) or not v_held.silent) then
    if v_held.silent then
      -- After this skip the record may be the only copy: the leader has to inspect it as soon as it
      -- can decide.
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

  -- If this were lost in a crash of PostgreSQL, the end that this run reports would count as late.
  if coalesce(current_setting('jobguard.commit', true), '') = '' then
    perform set_config('jobguard.commit', current_setting('synchronous_commit'), true);
  else
    perform set_config('synchronous_commit', current_setting('jobguard.commit'), true);
  end if;
  if v_held.left_at is null then
    crashes := crashes + 1;
  end if;
  if crashes > p_budget then
    with gone as (
      delete from jobguard.jobs j where j.source + 0 = p_source and j.token = p_token returning j.*
    ), unclaimed as (
      delete from jobguard.running r where r.source + 0 = p_source and r.token = p_token returning r.*
    )
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, errors, envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, 'dead', g.attempt, g.recoveries,
           claim.crashes, u.number, u.worker, g.recorded_at, u.claimed_at,
           array[format('%s workers died while they ran this job', claim.crashes)], g.envelope
    from gone g left join unclaimed u on true;
    delete from jobguard.suspects s where s.source + 0 = p_source and s.token = p_token;
    delete from jobguard.outbox b where b.source + 0 = p_source and b.token = p_token;
    verdict := 'spent';
    return;
  end if;
  if crashes <> v_job.crashes then
    update jobguard.jobs j set crashes = claim.crashes where j.source + 0 = p_source and j.token = p_token;
  end if;
  update jobguard.running r
  set number = r.number + 1, nonce = p_nonce, worker = p_worker, pid = p_pid, claimed_at = now(),
      execution = null, returned_at = null, heartbeat_at = null, progress = null, attrs = null
  where r.source + 0 = p_source and r.token = p_token returning r.number into number;
  verdict := 'granted';
end
$$;

-- End deliveries on behalf of their claims; see 0002.
create or replace function jobguard.end(
  p_source bigint, p_token uuid[], p_number int[], p_outcome text[], p_worker uuid[],
  p_ended float8[], p_job_id text[], p_queue text[], p_task text[], p_error text[],
  p_join text[], p_part bytea[])
returns text[] language plpgsql as $$
declare
  v_ended   uuid[] := '{}';
  v_unknown uuid[] := '{}';
  v_looked  uuid[];
  v_rows    uuid[] := p_token;
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
    -- delivery now.
    select s.*, r.claimed_at
    from said s
    join jobguard.jobs j on j.source + 0 = p_source and j.token = s.token and j.token = any (p_token)
    left join jobguard.running r on r.source + 0 = p_source and r.token = s.token
      and r.token = any (p_token)
    where r.number = s.number
       or (r.token is null and (s.outcome = 'completed' or s.number = 0))
       or (s.number = 0 and r.worker = s.worker)
  ), gone as (
    delete from jobguard.jobs j using valid v where j.source + 0 = p_source and j.token = v.token
      and j.token = any (p_token)
    returning j.*, v.number, v.outcome, v.worker, v.ended, v.error, v.claimed_at, v.join_id, v.part
  ), parts as (
    insert into jobguard.join_parts (source, join_id, job_id, token, queue, state, envelope)
    select g.source, g.join_id, g.job_id, g.token, g.queue, g.part, g.envelope from gone g
    where g.join_id is not null and not jobguard.is_closed(p_source, g.join_id)
    on conflict do nothing
  ), unclaimed as (
    delete from jobguard.running r using valid v where r.source + 0 = p_source and r.token = v.token
      and r.token = any (p_token)
  ), unsuspected as (
    delete from jobguard.suspects s using valid v where s.source + 0 = p_source and s.token = v.token
      and s.token = any (p_token)
  ), unboxed as (
    delete from jobguard.outbox b using valid v where b.source + 0 = p_source and b.token = v.token
      and b.token = any (p_token)
  ), tombstones as (
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, ended_at, errors,
                                  envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, g.outcome::jobguard.outcome, g.attempt,
           g.recoveries, g.crashes, g.number, g.worker, g.recorded_at, g.claimed_at,
           -- The worker's clock, within limits, because retention depends on it.
           least(now(), greatest(to_timestamp(g.ended), now() - interval '1 hour')),
           case when g.error is not null then array[g.error] end,
           case when g.outcome in ('failed', 'dead') then g.envelope end
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
  insert into jobguard.join_parts (source, join_id, job_id, token, queue, state)
  select distinct on (e.join_id, h.job_id) p_source, e.join_id, h.job_id, e.token, h.queue, e.part
  from unnest(p_token, p_outcome, p_join, p_part) e(token, outcome, join_id, part)
  join jobguard.history h on h.source + 0 = p_source and h.token = e.token and h.outcome = 'completed'
      and h.token = any (p_token)
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

-- Return the tokens that a cancel by job ids or by queue applies to; see jobguard.cancel.
create function jobguard.meant(
  p_source bigint, p_job_id text[], p_queue text, p_meant timestamptz, p_until uuid, p_waiting uuid[])
returns uuid[] language plpgsql as $$
declare
  v_found uuid[] := '{}';
begin
  if p_job_id <> '{}' then
    v_found := array(
      select j.token from jobguard.jobs j
      where j.source + 0 = p_source and j.job_id = any (p_job_id)
        and (j.token = any (p_waiting)
             or (j.recorded_at <= p_meant and (p_until is null or j.token <= p_until))));
  end if;
  if p_queue is not null then
    v_found := v_found || array(
      select j.token from jobguard.jobs j
      where j.source + 0 = p_source and j.queue = p_queue
        and (j.token = any (p_waiting)
             or (j.recorded_at <= p_meant and (p_until is null or j.token <= p_until))));
  end if;
  return v_found;
end
$$;

-- Write tombstones for cancelled deliveries; see 0002.
create or replace function jobguard.cancel(
  p_source bigint, p_token uuid[], p_job_id text[], p_queue text,
  p_meant timestamptz, p_until uuid, p_waiting uuid[])
returns integer language plpgsql as $$
declare
  v_owed  integer;
  v_rows  uuid[];
begin
  -- Running deliveries are locked with the rest of their queue: at the next query their claims may
  -- have been released.
  v_rows := p_token || jobguard.meant(p_source, p_job_id, p_queue, p_meant, p_until, p_waiting);
  perform from jobguard.jobs j
  where j.source + 0 = p_source and j.token = any (v_rows)
  order by j.token for update;
  v_rows := v_rows || jobguard.meant(p_source, p_job_id, p_queue, p_meant, p_until, p_waiting);
  with gone as (
    delete from jobguard.jobs j
    where j.source + 0 = p_source and j.token = any (v_rows)
      and (j.token = any (p_token) or j.job_id = any (p_job_id)
           or not exists (select from jobguard.running r
                          where r.source + 0 = p_source
                            and r.token = j.token and r.token = any (v_rows)))
    returning j.*
  ), unclaimed as (
    delete from jobguard.running r using gone g where r.source + 0 = p_source and r.token = g.token
      and r.token = any (v_rows)
    returning r.token, r.number, r.worker, r.claimed_at
  ), unsuspected as (
    delete from jobguard.suspects s using gone g where s.source + 0 = p_source and s.token = g.token
      and s.token = any (v_rows)
  ), unboxed as (
    delete from jobguard.outbox b using gone g where b.source + 0 = p_source and b.token = g.token
      and b.token = any (v_rows)
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


-- Retention.
--
-- All namespaces share history, so the longest retention counts: a day is dropped when no namespace
-- wants it. A namespace that has set no retention has the default of 7 days. A namespace that has
-- had no leader and no worker for longer than its retention has none.
create function jobguard.longest_retention(p_retention interval)
returns interval language sql stable as $$
  select greatest(p_retention, max(coalesce(l.retention, interval '7 days')))
  from (select s.namespace from jobguard.sources s union select l.namespace from jobguard.leader l) n
  left join jobguard.leader l on l.namespace = n.namespace
  where l.namespace is null or l.term = 0
     or l.expires_at > now() - coalesce(l.retention, interval '7 days')
     or exists (select from jobguard.workers w join jobguard.sources s on s.id = w.source
                where s.namespace = n.namespace
                  and w.beat_at > now() - coalesce(l.retention, interval '7 days'))
$$;

-- Run one step of retention, in a transaction of its own. Return what it did: 'made' or 'dropped' a
-- partition, 'deleted' a slice of old rows, 'busy' if a reader is in the way; null: nothing is left
-- to do.
--
-- The step waits for its locks for a shorter time than hosts wait for an answer, because they wait
-- behind it meanwhile. Rows of the default partition are never moved, because for a moment they
-- would be in neither place. They stay until their time is over, and days for which it has rows get
-- no partition.
create function jobguard.rotate_step(retention interval)
returns text language plpgsql security definer
  set search_path = jobguard, pg_temp set timezone = 'UTC' set lock_timeout = '50ms' as $$
declare
  oldest timestamptz;
  day    date;
  part   text;
begin
  if retention < interval '1 hour' then
    raise exception 'retention must be an hour at least, not %', retention;
  end if;
  if not pg_try_advisory_xact_lock(hashtextextended('jobguard.rotate', 0)) then
    return 'busy';
  end if;
  oldest := now() - jobguard.longest_retention(retention);
  for day in select generate_series(current_date - 1, current_date + 7, interval '1 day')::date loop
    part := 'history_' || to_char(day, 'YYYYMMDD');
    continue when to_regclass('jobguard.' || part) is not null
      or exists (select from history_default where ended_at >= day and ended_at < day + 1);
    -- Attached, not created in place: that would lock all of history.
    execute format('create table jobguard.%I (like jobguard.history including all)', part);
    execute format('alter table jobguard.history attach partition jobguard.%I for values from (%L) to (%L)',
                   part, day, day + 1);
    return 'made';
  end loop;
  for part in
    select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'jobguard.history'::regclass and c.relname ~ '^history_\d{8}$'
    order by c.relname
  loop
    continue when to_date(right(part, 8), 'YYYYMMDD') + 1 >= oldest;
    lock table only history in access exclusive mode;
    execute format('drop table jobguard.%I', part);
    return 'dropped';
  end loop;
  delete from history_default where ctid = any (array(
    select ctid from history_default where ended_at < oldest limit 5000));
  if found then
    return 'deleted';
  end if;
  delete from joins where ctid = any (array(
    select ctid from joins where coalesce(closed_at, opened_at) < oldest limit 5000));
  if found then
    return 'deleted';
  end if;
  delete from join_parts where ctid = any (array(
    select p.ctid from join_parts p
    where not exists (select from joins x where x.source = p.source and x.id = p.join_id)
      and p.ended_at < oldest
    limit 5000));
  return case when found then 'deleted' end;
exception when lock_not_available then
  return 'busy';
end
$$;
do $$
declare
  v_role text;
begin
  -- The function runs as the owner of the tables: a role that may not call rotate() may not call
  -- it.
  if (select p.proacl is not null from pg_proc p where p.oid = 'jobguard.rotate(interval)'::regprocedure) then
    revoke execute on function jobguard.rotate_step(interval) from public;
    for v_role in
      select case a.grantee when 0 then 'public' else quote_ident(a.grantee::regrole::text) end
      from pg_proc p, aclexplode(p.proacl) a
      where p.oid = 'jobguard.rotate(interval)'::regprocedure and a.privilege_type = 'EXECUTE'
    loop
      execute format('grant execute on function jobguard.rotate_step(interval) to %s', v_role);
    end loop;
  end if;
end
$$;

-- Run all steps in one transaction, up to 50. Return how many partitions were dropped.
create or replace function jobguard.rotate(retention interval default interval '7 days')
returns integer language plpgsql security definer
  set search_path = jobguard, pg_temp set timezone = 'UTC' set lock_timeout = '50ms' as $$
declare
  step    text;
  dropped integer := 0;
begin
  for n in 1..50 loop
    step := jobguard.rotate_step(retention);
    exit when step is null or step = 'busy';
    dropped := dropped + (step = 'dropped')::int;
  end loop;
  return dropped;
end
$$;
