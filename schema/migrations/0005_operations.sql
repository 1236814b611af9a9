-- What a person on call looks for: when and why each delivery was restored, how much is owed and was
-- done, and who changed what by hand.

create table jobguard.recoveries (
  token       uuid           not null,
  source      bigint         not null,
  cause       jobguard.cause not null,
  restored_at timestamptz    not null default now()
);
create index recoveries_by_token on jobguard.recoveries (token);
create index recoveries_by_time on jobguard.recoveries
  using brin (restored_at) with (pages_per_range = 16, autosummarize = on);
comment on table jobguard.recoveries is 'each restore of a delivery, with its cause';

-- Nobody can count ten million rows for each look at a page: the leader counts, some times a minute.
create table jobguard.activity (
  minute timestamptz not null,
  source bigint      not null,
  queue  text        collate "C" not null,
  what   text        not null,
  count  bigint      not null,
  primary key (minute, source, queue, what)
);
comment on column jobguard.activity.what is 'an outcome, or restored';

create table jobguard.owed_counts (
  source     bigint      primary key,
  counts     jsonb       not null,
  counted_at timestamptz not null default now()
) with (fillfactor = 50);
comment on column jobguard.owed_counts.counts is
  'of each queue: [queue, pending, scheduled, processing, stuck, age of the oldest due one in seconds]';

create table jobguard.actions (
  id        bigint      generated always as identity primary key,
  namespace text        not null,
  at        timestamptz not null default now(),
  actor     text        not null,
  action    text        not null,
  detail    text        not null default '',
  jobs      integer     not null default 0
);
create index actions_by_namespace on jobguard.actions (namespace, id);
comment on table jobguard.actions is 'what people did to jobs: who, when, and what';

-- Lists of the few that were given up or cancelled, and ranges of time, among millions of completed.
create index history_not_completed on jobguard.history (token)
  where outcome in ('failed', 'dead', 'cancelled');
create index history_by_end on jobguard.history
  using brin (ended_at) with (pages_per_range = 32, autosummarize = on);

-- The roles that may write jobs may write these too, without a new run of grants.sql.
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
    execute format('grant %s on jobguard.recoveries, jobguard.activity, jobguard.owed_counts,
                    jobguard.actions to %s', v_right.privilege, v_right.role);
  end loop;
end
$$;
