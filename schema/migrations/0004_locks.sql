-- Locks of running jobs. A lock belongs to a claim. It is free if that claim has ended or was
-- removed, or if its worker is dead. So a lock never lasts longer than the run that took it.
create table jobguard.locks (
  source   bigint      not null,
  name     text        collate "C" not null,
  token    uuid        not null,
  number   integer     not null,
  taken_at timestamptz not null default now(),
  primary key (source, name)
);

-- The worker that last lost its claim of the delivery: a run can ask for the run before it.
alter table jobguard.jobs add column last_worker uuid;
