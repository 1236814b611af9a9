-- Tasks whose effects must not repeat: a lost run goes to the dead letters.
set local lock_timeout = '3s';
alter table jobguard.jobs add column recover text check (recover in ('dead', 'never'));
comment on column jobguard.jobs.recover is
  'dead: a run that was lost is not repeated; never: nor is the delivery restored if Redis loses it; '
  'null: both';
create index jobs_ruled on jobguard.jobs (token) where recover is not null;

-- Store the rules of deliveries that the same statement has recorded.
create function jobguard.set_rules(p_source bigint, p_token uuid[], p_recover text[])
returns void language sql as $$
  update jobguard.jobs j set recover = f.recover
  from unnest(p_token, p_recover) f(token, recover)
  where j.source + 0 = p_source and j.token = f.token and j.token = any (p_token)
    and f.recover is distinct from j.recover
$$;

-- Let this transaction wait for the disk, although an earlier claim in it need not.
create function jobguard.wait_for_disk()
returns void language plpgsql as $$
begin
  if coalesce(current_setting('jobguard.commit', true), '') = '' then
    perform set_config('jobguard.commit', current_setting('synchronous_commit'), true);
  else
    perform set_config('synchronous_commit', current_setting('jobguard.commit'), true);
  end if;
end
$$;

-- Grant a claim, or return why not; see 0002 and 0003. p_recover: the rule of the task in the process of the
-- worker. It replaces the recorded one. A claim under a rule waits for the disk, and is never taken over.
drop function jobguard.claim(bigint, uuid, uuid, uuid, int, text, float8, int);
create function jobguard.claim(
  p_source bigint, p_token uuid, p_nonce uuid, p_worker uuid, p_pid int, p_namespace text,
  p_timeout float8, p_budget int, p_recover text default null,
  out verdict text, out number int, out crashes int, out outcome jobguard.outcome)
language plpgsql as $$
declare
  v_job    record;
  v_held   record;
  v_silent boolean;
  v_dead   boolean;
  v_rule   text;
begin
  select j.claims, j.crashes, j.recover into v_job
  from jobguard.jobs j where j.source + 0 = p_source and j.token = p_token for no key update;
  if not found then
    select h.outcome into outcome from jobguard.history h
    where h.source + 0 = p_source and h.token = p_token order by h.ended_at limit 1;
    verdict := case when found then 'ended' else 'unknown' end;
    return;
  end if;
  crashes := v_job.crashes;
  v_rule := coalesce(p_recover, v_job.recover);
  if v_rule is distinct from v_job.recover then
    update jobguard.jobs j set recover = v_rule where j.source + 0 = p_source and j.token = p_token;
  end if;
  v_dead := exists (select from jobguard.workers w where w.id = p_worker and w.dead_at is not null);
  if not v_dead then
    insert into jobguard.running as r (source, token, number, nonce, worker, pid)
    values (p_source, p_token, v_job.claims + 1, p_nonce, p_worker, p_pid)
    on conflict do nothing returning r.number into number;
    if found then
      -- A first claim does not wait for the disk: after a crash of PostgreSQL this start is
      -- unknown, like the starts made while PostgreSQL is away. It does wait if a takeover is part
      -- of this transaction, or if the run must not be repeated.
      if v_rule is not null then
        perform jobguard.wait_for_disk();
      elsif coalesce(current_setting('jobguard.commit', true), '') = '' then
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
  perform jobguard.wait_for_disk();
  if v_held.left_at is null then
    crashes := crashes + 1;
  end if;
  if crashes > p_budget or v_rule is not null then
    with gone as (
      delete from jobguard.jobs j where j.source + 0 = p_source and j.token = p_token returning j.*
    ), unclaimed as (
      delete from jobguard.running r where r.source + 0 = p_source and r.token = p_token returning r.*
    )
    insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                  crashes, number, worker, recorded_at, claimed_at, errors, envelope)
    select g.source, g.token, g.job_id, g.queue, g.task, 'dead', g.attempt, g.recoveries,
           claim.crashes, u.number, u.worker, g.recorded_at, u.claimed_at,
           case when v_rule is null
             then array[format('%s workers died while they ran this job', claim.crashes)]
             else array[format('its run was lost with its worker, and recover=%L forbids another run', v_rule)] end, g.envelope
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

-- Record first deliveries in the transaction of the caller. It takes no lock that another process
-- waits for, because this transaction may be long: older deliveries of the same job ids are
-- superseded after the commit. A time is the present one, not that of the transaction's start.
create or replace function jobguard.record_in_transaction(p_source bigint, p_rows text)
returns void language plpgsql as $$
begin
  with given as (
    select r.*
    from jsonb_to_recordset(p_rows::jsonb)
      r(token uuid, job_id text, queue text, task text, priority int, attempt int, due float8,
        expires float8, trace text, derived bool, recover text, envelope text)
    -- A run that was killed and started again sends its jobs a second time.
    where not (r.derived and exists (select from jobguard.history h
                                     where h.source + 0 = p_source and h.token = r.token))
  ), added as (
    insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                               expires_at, trace, recover, envelope,
                               recorded_at)
    select p_source, g.token, g.job_id, g.queue, g.task, g.priority, g.attempt,
           to_timestamp(g.due), to_timestamp(g.expires), g.trace, g.recover,
           decode(g.envelope, 'base64'),
           clock_timestamp()
    from given g
    on conflict do nothing
    returning token
  )
  insert into jobguard.outbox (source, token, unsent, not_before)
  select p_source, a.token, true, 'infinity' from added a;
end
$$;
