-- Record one delivery whose push is under way at the same time. Its worker may have recorded, run and
-- ended it before this statement comes: then it is not owed again.
create function jobguard.record_beside(
  p_source bigint, p_token uuid, p_job_id text, p_queue text, p_task text, p_priority int,
  p_attempt int, p_due float8, p_expires float8, p_key text, p_trace text, p_envelope bytea,
  p_commit text)
returns void language plpgsql as $$
begin
  if p_commit is not null then
    perform set_config('synchronous_commit', p_commit, true);
  end if;
  -- An end that finds no row takes this lock too, and writes its tombstone before or after us.
  perform jobguard.alone_with(p_token);
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                             expires_at, key, trace, envelope)
  values (p_source, p_token, p_job_id, p_queue, p_task, p_priority, p_attempt, to_timestamp(p_due),
          to_timestamp(p_expires), p_key, p_trace, p_envelope)
  on conflict do nothing;
  -- An insert waits for an end that deletes the same row. That end has committed its tombstone by
  -- now. The limits of the time leave out the partitions that cannot have it.
  delete from jobguard.jobs j
  where j.source + 0 = p_source and j.token = p_token and exists (
    select from jobguard.history h
    where h.source + 0 = p_source and h.token = p_token
      and h.ended_at > now() - interval '2 hours' and h.ended_at < now() + interval '2 hours');
  if found then
    -- The envelope is needed to report to the library again a member of a join that had ended before.
    update jobguard.join_parts p set envelope = p_envelope
    where p.source = p_source and p.token = p_token and p.envelope = '';
  end if;
end
$$;
