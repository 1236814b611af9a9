-- Put off a delivery by 5 minutes at most, so that one may go back any number of times; see 0002.
--
-- A run whose worker could not reach Redis before its function was called is no crash of the job, and goes back
-- until Redis has room for the worker.
create or replace function jobguard.decline(p_source bigint, p_token uuid, p_most int, p_wait float8, p_error text)
returns integer language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  v_declined int;
begin
  update jobguard.jobs j
  set declined = least(j.declined + 1, 32767),
      not_before = now() + make_interval(secs => least(p_wait * 2 ^ least(j.declined, 20), 300))
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
