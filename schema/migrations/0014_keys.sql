-- Keys of jobs: at most one owed delivery of a key, except for one that runs while its replacement waits.
set local lock_timeout = '3s';
create table jobguard.job_keys (
  key      text        collate "C" not null,
  source   bigint      not null,
  token    uuid        not null,
  taken_at timestamptz not null default now(),
  until    timestamptz,
  primary key (key, source)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
comment on table jobguard.job_keys is
  'the delivery that took a key last; the key is held while that delivery or one that replaced it is owed';
comment on column jobguard.job_keys.until is 'a throttled key is held until then in any case';

-- Return the delivery that holds a key now: the one that took it, or the latest one that replaced that one.
create function jobguard.key_holder(p_source bigint, p_token uuid, out token uuid, out job_id text)
language sql stable as $$
  with recursive chain(token) as (
    select p_token
    union
    select h.next from chain c
    join jobguard.history h on h.source + 0 = p_source and h.token = c.token and h.next is not null
  )
  select j.token, j.job_id from chain c
  join jobguard.jobs j on j.source + 0 = p_source and j.token = c.token
  limit 1
$$;

-- Take a key for a delivery that is recorded in the same transaction. The verdict is "free", "replaced"
-- (holder is the waiting delivery that it replaces), "held" or "throttled".
create function jobguard.take_key(
  p_source bigint, p_key text, p_token uuid, p_replace bool, p_window float8, p_deadline float8,
  out verdict text, out holder uuid, out job_id text)
language plpgsql as $$
declare
  v_key record;
begin
  perform pg_advisory_xact_lock(hashtextextended('key:' || p_key, p_source));
  select k.* into v_key from jobguard.job_keys k where k.key = p_key and k.source = p_source;
  verdict := 'free';
  if found and v_key.token <> p_token then
    select h.token, h.job_id into holder, job_id from jobguard.key_holder(p_source, v_key.token) h;
    if holder is not null then
      -- It cannot be claimed, retried or ended before this transaction ends.
      perform from jobguard.jobs j where j.source + 0 = p_source and j.token = holder for update;
      if not found then
        -- It ended or was retried a moment ago.
        select h.token, h.job_id into holder, job_id from jobguard.key_holder(p_source, v_key.token) h;
        perform from jobguard.jobs j where j.source + 0 = p_source and j.token = holder for update;
      end if;
    end if;
    if holder is not null and not p_replace then
      verdict := 'held';
      return;
    elsif holder is null and v_key.until > clock_timestamp() then
      verdict := 'throttled';
      return;
    elsif holder is not null and not exists (
        select from jobguard.running r where r.source + 0 = p_source and r.token = holder) then
      verdict := 'replaced';
      -- The one that it replaces is gone, so that it must not be withdrawn if its push fails.
      insert into jobguard.outbox (source, token, unsent, not_before)
      values (p_source, p_token, false, clock_timestamp() + make_interval(secs => p_deadline))
      on conflict do nothing;
    end if;
  end if;
  insert into jobguard.job_keys as k (key, source, token, until)
  values (p_key, p_source, p_token,
          case when p_window > 0 then clock_timestamp() + make_interval(secs => p_window) end)
  on conflict (key, source) do update
  set token = excluded.token, taken_at = now(), until = excluded.until;
end
$$;

-- Delete keys that no delivery holds. Return how many.
create function jobguard.forget_keys()
returns integer language plpgsql as $$
declare
  v_gone integer;
begin
  delete from jobguard.job_keys k where k.ctid = any (array(
    select x.ctid from jobguard.job_keys x
    where x.taken_at < now() - interval '1 hour' and (x.until is null or x.until < now())
      and (select h.token from jobguard.key_holder(x.source, x.token) h) is null
    limit 5000));
  get diagnostics v_gone = row_count;
  return v_gone;
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
    execute format('grant %s on jobguard.job_keys to %s', v_right.privilege, v_right.role);
  end loop;
end
$$;
