-- A key of a request is enforced: at the call as far as it can be known, and when the leader records the job.
set local lock_timeout = '3s';
create index requests_key on jobguard.requests (key, source) where key is not null;

-- Take the keys of deliveries that are recorded in the same statement, in their order. Return those that get
-- no key, each with the job that holds it (null: the key is throttled).
create function jobguard.take_keys(p_source bigint, p_token uuid[], p_job_id text[], p_key text[])
returns table (token uuid, holder text) language plpgsql as $$
declare
  v_sent record;
  v_key  record;
begin
  for v_sent in
    select f.token, f.key, row_number() over same as place, first_value(f.job_id) over same as first
    from unnest(p_token, p_job_id, p_key) with ordinality f(token, job_id, key, nth)
    where f.key is not null
    window same as (partition by f.key order by f.nth)
    order by f.key, f.nth
  loop
    if v_sent.place = 1 then
      select * into v_key from jobguard.take_key(p_source, v_sent.key, v_sent.token, false, 0, 0);
      continue when v_key.verdict = 'free';
    end if;
    token := v_sent.token;
    holder := case when v_key.verdict = 'free' then v_sent.first else v_key.job_id end;
    return next;
  end loop;
end
$$;

-- The roles that may call the function may call its successor.
select set_config('jobguard.callers', coalesce(string_agg(
         case a.grantee when 0 then 'public' else quote_ident(a.grantee::regrole::text) end, ', '), ''), true)
from pg_proc p, aclexplode(p.proacl) a
where p.pronamespace = 'jobguard'::regnamespace and p.proname = 'enqueue' and a.grantee <> p.proowner;

drop function jobguard.enqueue(
  text, text, text, jsonb, jsonb, timestamptz, integer, text, integer, text, text, text);

-- Ask for a job, in the transaction of the caller. Returns its id, or that of the job that holds the key (null:
-- the key is throttled). The leader sends it within a second of the commit.
create function jobguard.enqueue(
  library text, queue text, task text, args jsonb default '[]', kwargs jsonb default '{}',
  due timestamptz default null, priority integer default 0, key text default null,
  max_attempts integer default null, source text default null, namespace text default 'default',
  unknown text default 'warn', on_conflict text default 'ignore')
returns text language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
  v_source bigint := jobguard.source_of(enqueue.namespace, enqueue.library, enqueue.source);
  v_job_id text;
  v_until  timestamptz;
begin
  perform jobguard.check_request(
    v_source, enqueue.queue, enqueue.task, enqueue.args, enqueue.kwargs, enqueue.priority,
    enqueue.max_attempts, enqueue.unknown, true);
  if coalesce(enqueue.on_conflict, '') not in ('ignore', 'raise') then
    raise exception using errcode = '22023', message = format('on_conflict is %L', enqueue.on_conflict),
      hint = 'one of: ignore, raise';
  end if;
  if enqueue.key = '' or octet_length(enqueue.key) > 1000 then
    raise exception using errcode = '22023', message = 'a key has 1 to 1000 bytes';
  end if;
  if enqueue.key is not null then
    select r.job_id into v_job_id from jobguard.requests r
    where r.key = enqueue.key and r.source = v_source and r.error is null order by r.id limit 1;
    if not found then
      select h.job_id, k.until into v_job_id, v_until
      from jobguard.job_keys k cross join lateral jobguard.key_holder(k.source, k.token) h
      where k.key = enqueue.key and k.source = v_source;
    end if;
    if v_job_id is not null or v_until > clock_timestamp() then
      if enqueue.on_conflict = 'raise' then
        raise exception using errcode = '23505', message = format(
          'the key %L is held%s', enqueue.key, coalesce(' by job ' || v_job_id, ' until ' || v_until));
      end if;
      return v_job_id;
    end if;
  end if;
  insert into jobguard.requests (source, job_id, queue, task, args, kwargs, due_at, priority, key,
                                 max_attempts)
  values (v_source, gen_random_uuid()::text, enqueue.queue, enqueue.task, enqueue.args, enqueue.kwargs,
          enqueue.due, enqueue.priority, enqueue.key, enqueue.max_attempts)
  returning job_id into v_job_id;
  return v_job_id;
end
$$;

revoke execute on function jobguard.enqueue from public;
do $$
begin
  if current_setting('jobguard.callers') <> '' then
    execute 'grant execute on function jobguard.enqueue to ' || current_setting('jobguard.callers');
  end if;
end
$$;
