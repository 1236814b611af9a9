-- Locks of running jobs. A lock belongs to a claim: it is free when that claim has ended, was taken away, or
-- its worker is dead. So it never outlives the run that took it.
create table jobguard.locks (
  source   bigint      not null,
  name     text        collate "C" not null,
  token    uuid        not null,
  number   integer     not null,
  taken_at timestamptz not null default now(),
  primary key (source, name)
);

-- Which worker held the claim that was taken away last: what a run may want to know of the one before it.
alter table jobguard.jobs add column last_worker uuid;
