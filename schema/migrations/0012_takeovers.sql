-- The worker whose claim was taken over by another start, without a leader that voided it, is the
-- predecessor of the new run. A trigger costs a start nothing: it acts only where a claim changes hands.

set local lock_timeout = '3s';
create function jobguard.note_takeover() returns trigger language plpgsql as $$
begin
  update jobguard.jobs j set last_worker = old.worker
  where j.source + 0 = old.source and j.token = old.token;
  return null;
end $$;

create trigger note_takeover after update of number on jobguard.running for each row
when (old.number <> new.number and old.worker is distinct from new.worker)
execute function jobguard.note_takeover();
