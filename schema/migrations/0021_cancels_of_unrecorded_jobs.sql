-- A late cancel also means what came of a delivery that had no record when it was moved.
--
-- Its tombstone has no time of a record: the record waited, with the cancel, for the end of the outage.

-- Return the deliveries that a cancel means; see 0003 and 0017.
create or replace function jobguard.meant(
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
    if p_until is not null
       and exists (select from jobguard.sources s where s.id = p_source and not s.one_body) then
      v_found := v_found || array(
        with recursive later as (
          select h.next as token from jobguard.history h
          where h.source + 0 = p_source and h.job_id = any (p_job_id)
            and h.outcome = 'superseded' and h.next is not null
            and (h.token = any (p_waiting)
                 or (coalesce(h.recorded_at <= p_meant, true) and h.token <= p_until))
          union
          select h.next from later l
          join jobguard.history h on h.source + 0 = p_source and h.token = l.token
          where h.outcome = 'superseded' and h.next is not null
        )
        select j.token from jobguard.jobs j
        where j.source + 0 = p_source and j.token = any (array(select token from later)));
    end if;
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
