-- Say whether a requeue is possible, to a role that may not read envelopes.
create function jobguard.is_kept(p_source bigint, p_token uuid, p_ended_at timestamptz)
returns boolean language sql stable security definer set search_path = jobguard, pg_temp as $$
  select h.envelope is not null from history h
  where h.source = p_source and h.token = p_token and h.ended_at = p_ended_at
$$;
