-- Effects of jobs that happen once: an e-mail, a payment.
--
-- An effect without done_at is in progress by the claim that its row names, or was left behind by it. With the
-- transaction of the effect itself, the row appears with the effect.
set local lock_timeout = '3s';
create table jobguard.effects (
  key        text        collate "C" not null,
  source     bigint      not null,
  job_id     text        collate "C",
  token      uuid        not null,
  number     integer     not null,
  started_at timestamptz not null default now(),
  done_at    timestamptz,
  result     text,
  primary key (key, source)
) with (autovacuum_vacuum_scale_factor = 0.05);
create index effects_by_time on jobguard.effects using brin (started_at) with (autosummarize = on);
comment on column jobguard.effects.job_id is 'the job whose effect it is; null: the key is one for all jobs';
comment on column jobguard.effects.result is 'what the effect returned, as JSON';

-- Begin an effect for a claim. p_atomic: the effect is a part of this transaction, and is done when it
-- commits. The verdict is "first", "done", "busy" (another live claim does it), "left" (a claim that ended
-- without a result left it behind) or "unclaimed" (the run has no claim any more).
create function jobguard.begin_effect(
  p_source bigint, p_key text, p_job_id text, p_token uuid, p_number int, p_again bool, p_atomic bool,
  out verdict text, out result text)
language plpgsql as $$
declare
  v_number int;
  v_effect record;
begin
  select r.number into v_number from jobguard.running r
  where r.source + 0 = p_source and r.token = p_token and p_number in (0, r.number);
  if p_atomic then
    -- Another transaction that has this effect: wait for its end.
    perform pg_advisory_xact_lock(hashtextextended(p_key, p_source));
    v_number := coalesce(v_number, p_number);
  elsif v_number is null then
    verdict := 'unclaimed';
    return;
  elsif not pg_try_advisory_xact_lock(hashtextextended(p_key, p_source)) then
    verdict := 'busy';
    return;
  end if;
  insert into jobguard.effects (key, source, job_id, token, number, done_at)
  values (p_key, p_source, p_job_id, p_token, v_number, case when p_atomic then now() end)
  on conflict do nothing;
  if found then
    verdict := 'first';
    return;
  end if;
  select e.* into v_effect from jobguard.effects e
  where e.key = p_key and e.source = p_source for update;
  -- A job that was sent again under the id of a completed one is another job.
  if p_job_id is not null and exists (
       select from jobguard.history h
       where h.source + 0 = p_source and h.job_id = p_job_id and h.token >= v_effect.token
         and h.token <> p_token and h.outcome in ('completed', 'cancelled')) then
    verdict := 'first';
  elsif v_effect.done_at is not null then
    verdict := 'done';
    result := v_effect.result;
    return;
  elsif (v_effect.token, v_effect.number) <> (p_token, v_number) and exists (
       select from jobguard.running r join jobguard.workers w on w.id = r.worker
       where r.source + 0 = p_source and r.token = v_effect.token and r.number = v_effect.number
         and jobguard.holds(w, r)) then
    verdict := 'busy';
    return;
  elsif p_again then
    verdict := 'first';
  else
    verdict := 'left';
    return;
  end if;
  update jobguard.effects e
  set token = p_token, number = v_number, started_at = now(), result = null,
      done_at = case when p_atomic then now() end
  where e.key = p_key and e.source = p_source;
end
$$;

-- Delete old effects, except for those of jobs that are still owed. Return how many.
create function jobguard.forget_effects(p_older timestamptz)
returns integer language plpgsql as $$
declare
  v_gone integer;
begin
  delete from jobguard.effects e where e.ctid = any (array(
    select x.ctid from jobguard.effects x
    where x.started_at < p_older
      and (x.job_id is null or not exists (
        select from jobguard.jobs j where j.source + 0 = x.source and j.job_id = x.job_id))
    limit 5000));
  get diagnostics v_gone = row_count;
  return v_gone;
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
  perform jobguard.forget_effects(now() - jobguard.longest_retention(retention));
  return dropped;
end
$$;

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
    execute format('grant %s on jobguard.effects to %s', v_right.privilege, v_right.role);
  end loop;
end
$$;
