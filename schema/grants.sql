-- The rights of a role that records, works and reconciles, and owns nothing.
--
--   psql -v role=app -f grants.sql "$OWNER_URL"
--
-- Run it as the owner of the schema, after `jobguard migrate`, and again after each upgrade: new
-- tables come without rights. The role itself is yours to create. With these rights it reads and
-- writes every row, and creates, alters and drops nothing; retention goes through
-- jobguard.rotate(), which runs as the owner.
--
-- Whoever may write jobguard.jobs.envelope decides what your workers run.

\set ON_ERROR_STOP on

begin;

grant usage on schema jobguard to :"role";
grant select, insert, update, delete on all tables in schema jobguard to :"role";
grant usage on all sequences in schema jobguard to :"role";

-- The list of migrations is the migrator's alone.
revoke insert, update, delete on jobguard.migrations from :"role";

-- jobguard.rotate() runs with the owner's rights: not for everybody.
revoke execute on all functions in schema jobguard from public;
grant execute on all functions in schema jobguard to :"role";

-- The leader vacuums the small tables itself. Before PostgreSQL 17 only an owner may, and autovacuum
-- has to do.
select current_setting('server_version_num')::integer >= 170000 as has_maintain \gset
\if :has_maintain
grant maintain on
  jobguard.jobs, jobguard.running, jobguard.workers, jobguard.suspects, jobguard.outbox,
  jobguard.leader, jobguard.sources, jobguard.queues
to :"role";
\endif

commit;
