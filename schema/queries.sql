-- The statements of jobguard, by name. Each may be sent twice, because it is sent again after a lost answer.
-- Statements that find rows by job id, or by the tokens of a join, use "source + 0": see migration 0003.

-- name: register
-- Register a source. The row of the first process stays, except for the serializer: the last one that is
-- known counts.
with added as (
  insert into jobguard.sources as s (id, namespace, library, address, prefix, name, settings, one_body,
                                     serializer)
  values (%(id)s, %(namespace)s, %(library)s, %(address)s, %(prefix)s, %(name)s, %(settings)s,
          %(one_body)s, %(serializer)s)
  on conflict (id) do update set serializer = excluded.serializer
  where excluded.serializer not in ('', s.serializer)
)
select s.settings, s.pulse_epoch, s.pulse_n, s.run_id, i.name
from jobguard.installation i left join jobguard.sources s on s.id = %(id)s

-- name: record_one
-- Record one delivery whose job id was created for it: no rule can refuse it.
with calm as materialized (
  select set_config('synchronous_commit',
                    coalesce(%(commit)s, current_setting('synchronous_commit')), true)
), added as (
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                             expires_at, key, trace, envelope)
  select %(source)s, %(token)s, %(job_id)s, %(queue)s, %(task)s, %(priority)s, %(attempt)s,
         to_timestamp(%(due)s::float8), to_timestamp(%(expires)s::float8), %(key)s, %(trace)s,
         %(envelope)s
  from calm
  on conflict do nothing
)
select jobguard.led(%(namespace)s)

-- name: record_beside
-- Record one such delivery while its push is under way. It may have ended already: then it is not owed.
select jobguard.record_beside(
         %(source)s, %(token)s, %(job_id)s, %(queue)s, %(task)s, %(priority)s::int,
         %(attempt)s::int, %(due)s::float8, %(expires)s::float8, %(key)s, %(trace)s, %(envelope)s,
         %(commit)s),
       jobguard.led(%(namespace)s)

-- name: record_fresh
-- Record many such deliveries.
with calm as materialized (
  select set_config('synchronous_commit',
                    coalesce(%(commit)s, current_setting('synchronous_commit')), true)
), added as (
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, attempt, due_at,
                             expires_at, key, trace, envelope)
  select %(source)s, f.token, f.job_id, f.queue, f.task, f.priority, f.attempt,
         to_timestamp(f.due), to_timestamp(f.expires), f.key, f.trace, f.envelope
  from calm, unnest(%(token)b::uuid[], %(job_id)b::text[], %(queue)b::text[], %(task)b::text[],
              %(priority)b::int[], %(attempt)b::int[], %(due)s::float8[], %(expires)s::float8[],
              %(key)s::text[], %(trace)s::text[], %(envelope)b::bytea[])
    f(token, job_id, queue, task, priority, attempt, due, expires, key, trace, envelope)
  on conflict do nothing
)
select jobguard.led(%(namespace)s)

-- name: record
-- Record deliveries that may supersede others, or that have a rule for their recovery.
select r.refused, jobguard.led(%(namespace)s),
       case when %(ruled)s then jobguard.set_rules(%(source)s, %(token)b::uuid[], %(recover)s::text[]) end
from (select jobguard.record(
  %(source)s, %(token)b::uuid[], %(job_id)b::text[], %(queue)b::text[], %(task)b::text[],
  %(priority)b::int[], %(attempt)b::int[], %(due)s::float8[], %(expires)s::float8[],
  %(key)s::text[], %(trace)s::text[], %(envelope)b::bytea[], %(parent)s::uuid[], %(claim)s::int[],
  %(outcome)s::text[], %(speaker)s::uuid[], %(fresh)b::bool[],
  %(derived)b::bool[], %(closes)s::text[], %(outbox)s, %(replay)s, %(newest)s,
  %(error)s::text[]) as refused) r

-- name: installation_id
select i.id::text from jobguard.installation i

-- name: record_in_transaction
-- Record deliveries in a transaction of the application, on its connection. The driver may be any one, so that
-- each parameter is a text.
select jobguard.record_in_transaction(cast(cast(%(source)s as text) as bigint), cast(%(rows)s as text))

-- name: take_committed
-- Take the push of deliveries that this process recorded in a transaction; return the committed ones.
select jobguard.take_committed(%(source)s, %(tokens)b::uuid[], %(deadline)s::float8)

-- name: see_committed
select jobguard.see_committed(%(namespace)s, %(term)s, %(source)s, %(wait)s::float8)

-- name: record_keyed
-- Record one delivery if its key is free, or in the place of the waiting one that holds the key.
select k.verdict, k.job_id, k.refused, jobguard.led(%(namespace)s),
       case when %(recover)s::text is not null then
         jobguard.set_rules(%(source)s, array[%(token)s::uuid], array[%(recover)s::text]) end
from (
select k.verdict, k.job_id,
       case when k.verdict in ('free', 'replaced') then jobguard.record(
         %(source)s, array[%(token)s::uuid], array[%(job_id)s::text], array[%(queue)s::text],
         array[%(task)s::text], array[%(priority)s::int], array[%(attempt)s::int],
         array[%(due)s::float8], array[%(expires)s::float8], array[%(key)s::text],
         array[%(trace)s::text], array[%(envelope)s::bytea], array[k.holder], array[null::int],
         array['superseded'], array[null::uuid], array[%(fresh)s::bool],
         array[%(derived)s::bool], array[null::text], false, false, false, array[null::text]) end
         as refused
from (
  select verdict, job_id, case when verdict = 'replaced' then holder end as holder
  from jobguard.take_key(%(source)s, %(key)s, %(token)s, %(replace)s, %(window)s::float8,
                         %(deadline)s::float8)
) k
) k

-- name: forget_keys
select jobguard.forget_keys()

-- name: withdraw
-- Delete deliveries that were never pushed. One that was recorded in a transaction of the application stays.
with locked as materialized (
  select j.token from jobguard.jobs j
  where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[]) order by j.token for update
), gone as (
  delete from jobguard.jobs j using locked l
  where j.source + 0 = %(source)s and j.token = l.token and j.claims = 0
    and j.token = any (%(tokens)b::uuid[])
    and not exists (select from jobguard.running r where r.source + 0 = %(source)s
                      and r.token = j.token and r.token = any (%(tokens)b::uuid[]))
    and not exists (select from jobguard.outbox b where b.source + 0 = %(source)s
                      and b.token = j.token and b.token = any (%(tokens)b::uuid[])
                      and b.not_before is not null)
  returning j.token
), unboxed as (
  delete from jobguard.outbox b using gone g where b.source + 0 = %(source)s and b.token = g.token
    and b.token = any (%(tokens)b::uuid[])
)
delete from jobguard.suspects s using gone g where s.source + 0 = %(source)s and s.token = g.token
  and s.token = any (%(tokens)b::uuid[])

-- name: outbox
-- Leave the push of owed deliveries to the leader.
insert into jobguard.outbox as b (source, token, unsent)
select j.source, j.token, false from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
on conflict (token, source) do update set not_before = now() where b.not_before is not null

-- name: claim
select verdict, number, crashes, outcome::text
from jobguard.claim(%(source)s, %(token)s, %(nonce)s, %(worker)s, %(pid)s::int, %(namespace)s,
                    %(timeout)s::float8, %(budget)s::int, %(recover)s::text)

-- name: claims
-- Answer several claim requests of one process. Rows of jobs are locked in the order of their tokens.
select a.nonce, a.token, c.verdict, c.number, c.crashes, c.outcome::text
from (
  select u.token, u.nonce, u.worker, u.recover
  from unnest(%(token)b::uuid[], %(nonce)b::uuid[], %(worker)b::uuid[], %(recover)s::text[])
    u(token, nonce, worker, recover)
  order by u.token
) a
cross join lateral jobguard.claim(%(source)s, a.token, a.nonce, a.worker, %(pid)s::int,
                                  %(namespace)s, %(timeout)s::float8, %(budget)s::int,
                                  a.recover) c

-- name: release
-- Remove a claim on behalf of its own worker, so that any worker may start the delivery again. The claim of an
-- interrupted run stays if its rule forbids another run.
with locked as (
  select j.token from jobguard.jobs j
  where j.source + 0 = %(source)s and j.token = %(token)s
    and not (%(interrupted)s and j.recover is not null)
  for update
), gone as (
  delete from jobguard.running r using locked l
  where r.source + 0 = %(source)s and r.token = l.token and r.worker = %(worker)s
    and %(number)s in (0, r.number)
  returning r.token, r.number
)
update jobguard.jobs j set claims = greatest(j.claims, g.number)
from gone g where j.source + 0 = %(source)s and j.token = g.token and j.token = %(token)s

-- name: predecessor
select j.last_worker from jobguard.jobs j where j.source + 0 = %(source)s and j.token = %(token)s

-- name: lock
-- Take a lock. A lock is free if the claim that took it no longer exists, or if its worker is dead.
with mine as (
  select r.token, r.number from jobguard.running r
  where r.source = %(source)s and r.token = %(token)s and %(number)s in (0, r.number)
)
insert into jobguard.locks as l (source, name, token, number)
select %(source)s, %(name)s, m.token, m.number from mine m
on conflict (source, name) do update
set token = excluded.token, number = excluded.number, taken_at = now()
where (l.token = excluded.token and l.number = excluded.number)
   or not exists (
     select from jobguard.running r join jobguard.workers w on w.id = r.worker
     where r.source = l.source and r.token = l.token and r.number = l.number
       and jobguard.holds(w, r))
returning true

-- name: unlock
delete from jobguard.locks l
where l.source = %(source)s and l.name = %(name)s and l.token = %(token)s

-- name: refuse
with alone as materialized (select jobguard.alone_with(%(token)b::uuid[]))
insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt)
select %(source)s, f.token, f.job_id, f.queue, f.task,
       (case when exists (select from jobguard.history h where h.source + 0 = %(source)s
                            and h.token = f.parent and h.outcome = 'cancelled')
        then 'cancelled' else 'superseded' end)::jobguard.outcome, f.attempt
from alone, unnest(%(token)b::uuid[], %(parent)b::uuid[], %(job_id)b::text[], %(queue)b::text[],
                   %(task)b::text[], %(attempt)b::int[]) f(token, parent, job_id, queue, task, attempt)
where not exists (select from jobguard.jobs j where j.source + 0 = %(source)s and j.token = f.token)
  and not exists (select from jobguard.history h where h.source + 0 = %(source)s
                    and h.token = f.token)

-- name: begin_effect
select verdict, result
from jobguard.begin_effect(%(source)s, %(key)s, %(job_id)s, %(token)s, %(number)s::int, %(again)s, false)

-- name: begin_effect_in_transaction
-- The same as a part of a transaction of the application, on its connection: each parameter is a text.
select verdict, result
from jobguard.begin_effect(
  cast(cast(%(source)s as text) as bigint), cast(%(key)s as text), nullif(cast(%(job_id)s as text), ''),
  cast(cast(%(token)s as text) as uuid), cast(cast(%(number)s as text) as int),
  cast(cast(%(again)s as text) as bool), true)

-- name: finish_effect
update jobguard.effects e set done_at = now(), result = %(result)s::text
where e.key = %(key)s and e.source = %(source)s and e.token = %(token)s
  and %(number)s::int in (0, e.number) and e.done_at is null

-- name: store_effect
-- Store the result of an effect of the application's transaction, on its connection.
update jobguard.effects e set result = cast(%(result)s as text)
where e.key = cast(%(key)s as text) and e.source = cast(cast(%(source)s as text) as bigint)
returning e.key

-- name: forget_effect
delete from jobguard.effects e
where e.key = %(key)s and e.source = %(source)s and e.token = %(token)s
  and %(number)s::int in (0, e.number) and e.done_at is null

-- name: forget_effects
select jobguard.forget_effects(now() - jobguard.longest_retention(make_interval(secs => %(retention)s)))

-- name: forget_locks
-- Delete old locks of runs that were killed.
delete from jobguard.locks l
where l.taken_at < now() - interval '1 day' and not exists (
  select from jobguard.running r
  where r.source = l.source and r.token = l.token and r.number = l.number)

-- name: end
select jobguard.end(
  %(source)s, %(token)b::uuid[], %(number)b::int[], %(outcome)s::text[], %(worker)b::uuid[],
  %(ended)b::float8[], %(job_id)b::text[], %(queue)b::text[], %(task)b::text[], %(error)s::text[],
  %(join)s::text[], %(part)s::bytea[])

-- name: completed_after_all
update jobguard.history h set outcome = 'completed'
from unnest(%(token)b::uuid[], %(number)b::int[], %(worker)b::uuid[]) e(token, number, worker)
where h.source = %(source)s and h.token = e.token and h.outcome = 'cancelled'
  and h.number = e.number and h.worker = e.worker
returning h.token

-- name: open_join
with opened as (
  insert into jobguard.joins as x (source, id, name, size, state)
  values (%(source)s, %(join)s, %(name)s, %(size)s, %(state)s)
  -- If the same join comes again (an application sends one chord twice), it is opened again.
  on conflict (source, id) do update
  set size = excluded.size, state = excluded.state, name = excluded.name, opened_at = now(), closed_at = null, closed_by = null
  where x.size = 0 or x.closed_at is not null
)
select jobguard.led(%(namespace)s)

-- name: close_join
-- Close a join that will have no continuation, and delete its parts.
with closed as (
  insert into jobguard.joins as x (source, id, closed_at) values (%(source)s, %(join)s, now())
  on conflict (source, id) do update set closed_at = now() where x.closed_at is null
)
delete from jobguard.join_parts p where p.source = %(source)s and p.join_id = %(join)s

-- name: decline
select jobguard.decline(%(source)s, %(token)s, %(most)s, %(wait)s::float8, %(error)s)

-- name: cancel
select jobguard.cancel(
  %(source)s, %(tokens)b::uuid[], %(job_ids)b::text[], %(queue)s,
  to_timestamp(%(meant)s::float8), %(until)s::uuid, %(waiting)b::uuid[])

-- name: beat
-- Store a worker's beat. A beat of a worker that was declared dead is ignored, and so is a beat that arrives
-- after a later one, because its list is old. The beats of the worker, of its beat process and of the process
-- that took over its beats have one common order.
with taken as (
  insert into jobguard.workers as w (id, source, name, host, pid, queues, claims, beat,
                                     unflushed_since, pulse_epoch, pulse_n)
  values (%(worker)s, %(source)s, %(name)s, %(host)s, %(pid)s, %(queues)b::text[],
          %(claims)b::uuid[], %(beat)s, to_timestamp(%(unflushed)s::float8), %(epoch)s, %(n)s)
  on conflict (id) do update
  set claims = excluded.claims, beat = excluded.beat, unflushed_since = excluded.unflushed_since,
      pulse_epoch = excluded.pulse_epoch, pulse_n = excluded.pulse_n, queues = excluded.queues,
      previous_beat_at = w.beat_at, beat_at = now()
  where w.dead_at is null and excluded.beat >= w.beat
)
select exists (select from jobguard.workers w where w.id = %(worker)s and w.dead_at is not null),
       jobguard.led(%(namespace)s)
from (select set_config('synchronous_commit', 'off', true)) calm

-- name: leave
update jobguard.workers set left_at = now() where id = %(worker)s and left_at is null

-- name: report_death
-- The same as declare_dead, by a process on the worker's host that has proved the death.
update jobguard.workers w
set dead_at = now(), claims = array(select r.token from jobguard.running r where r.worker = w.id)
where w.id = %(worker)s and w.dead_at is null and w.left_at is null

-- name: recoverable
-- Return those deliveries that a leader will restore: of a trusted queue, in a source that is watched. A source
-- that was watched within the last five minutes counts too: its leader may have died, and the next one takes over.
select j.token from jobguard.jobs j
join jobguard.sources s on s.id = j.source
join jobguard.queues q on q.source = j.source and coalesce(q.name, q.queue) = j.queue
left join jobguard.running r on r.source + 0 = %(source)s and r.token = j.token
  and r.token = any (%(tokens)b::uuid[])
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
  and q.trusted_since <= case when r.token is null then j.recorded_at else now() end
  and s.watched_at > now() - interval '5 minutes'

-- name: envelope_of
select j.envelope from jobguard.jobs j where j.source + 0 = %(source)s and j.token = %(token)s

-- name: amend
-- Change an envelope, unless another process has changed it meanwhile.
update jobguard.jobs j set envelope = %(envelope)s::bytea
where j.source + 0 = %(source)s and j.token = %(token)s and j.envelope = %(before)s::bytea
returning true

-- name: heartbeat
-- Store a running job's progress, only for the given claim number if there is one.
update jobguard.running r
set heartbeat_at = now(), progress = coalesce(%(progress)s::real, r.progress),
    attrs = case when %(attrs)s::jsonb is null then r.attrs
                 else coalesce(r.attrs, '{}'::jsonb) || %(attrs)s::jsonb end
where r.source = %(source)s and r.token = any (%(tokens)b::uuid[])
  and (%(number)s::int is null or r.number = %(number)s::int)
returning true

-- name: owed_of
-- Return the owed deliveries of a job id.
select j.token from jobguard.jobs j where j.source + 0 = %(source)s and j.job_id = %(job_id)s

-- name: elect
-- Take the lease if it has been free for some seconds, or if it was granted to this process without its knowing.
insert into jobguard.leader as l (namespace, term, holder, host, pid, expires_at)
values (%(namespace)s, 1, %(holder)s, %(host)s, %(pid)s, now() + make_interval(secs => %(lease)s))
on conflict (namespace) do update
set term = l.term + 1, holder = excluded.holder, host = excluded.host, pid = excluded.pid,
    elected_at = now(), expires_at = excluded.expires_at
where l.expires_at <= now() - make_interval(secs => %(patience)s) or l.holder = excluded.holder
returning term

-- name: renew
-- Extend the lease of this term, and return the brake.
update jobguard.leader set expires_at = now() + make_interval(secs => %(lease)s)
where namespace = %(namespace)s and term = %(term)s and holder = %(holder)s and expires_at > now()
returning paused_at is not null, held

-- name: signs
-- Return the brake, and whether there is anything to do. The newest owed job is found by the end of an index.
select l.paused_at is not null, l.held,
       exists (select from (select j.token from jobguard.jobs j order by j.token desc limit 1) newest)
         or exists (select from jobguard.joins x where x.closed_at is null),
       exists (select from (select r.id from jobguard.requests r where r.error is null
                            order by r.id limit 1) oldest)
         or exists (select from jobguard.schedules s
                    where s.namespace = l.namespace and s.paused_at is null and s.error is null
                      and not s.finished and coalesce(s.fire_at <= now(), true)),
       (select count(*) from jobguard.sources s where s.namespace = l.namespace)
from jobguard.leader l
where l.namespace = %(namespace)s and l.term = %(term)s and l.holder = %(holder)s and l.expires_at > now()

-- name: resign
update jobguard.leader set expires_at = now()
where namespace = %(namespace)s and term = %(term)s and holder = %(holder)s

-- name: now
select extract(epoch from clock_timestamp())::float8

-- name: identity
select i.id::text, i.name, i.system_identifier, i.database_oid::text,
       (select system_identifier::text from pg_control_system()),
       (select oid::text from pg_database where datname = current_database())
from jobguard.installation i

-- name: identity_without_control
-- The same for a role that may not read the system identifier.
select i.id::text, i.name, i.system_identifier, i.database_oid::text, null::text,
       (select oid::text from pg_database where datname = current_database())
from jobguard.installation i

-- name: sources
select id, namespace, library, address, prefix, name, settings, one_body, pulse_epoch, pulse_n, run_id,
       extract(epoch from watched_at)::float8
from jobguard.sources where namespace = %(namespace)s order by id

-- name: acknowledge
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), moved as (
  update jobguard.sources set pulse_epoch = %(epoch)s, pulse_n = %(n)s,
    run_id = coalesce(%(run_id)s, run_id), watched_at = now()
  from lease
  where id = %(source)s
    and (pulse_epoch is not distinct from %(known_epoch)s::uuid and pulse_n is not distinct from %(known_n)s::bigint
         or pulse_epoch = %(epoch)s and pulse_n between coalesce(%(known_n)s::bigint, 0) and %(n)s)
  returning true
)
select exists (select from moved) from lease

-- name: open_incident
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
)
insert into jobguard.incidents (source, cause, detail, epoch)
select %(source)s, %(cause)s, %(detail)s, %(epoch)s from lease
returning id

-- name: incidents
select id, source, cause, detail, extract(epoch from now() - opened_at)::float8, missing, restored
from jobguard.incidents where source = %(source)s and closed_at is null order by id

-- name: incident_progress
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
)
update jobguard.incidents i
set missing = i.missing + %(missing)s, restored = i.restored + %(restored)s,
    closed_at = case when %(close)s then now() else i.closed_at end
from lease where i.id = %(incident)s
returning true

-- name: workers
-- Claims are counted up to two: that shows whether a worker has none, one or more.
select w.id, w.name, w.host, w.pid, w.queues, w.beat, extract(epoch from w.started_at)::float8,
       extract(epoch from w.unflushed_since)::float8, w.pulse_epoch, w.pulse_n,
       extract(epoch from now() - w.left_at)::float8, w.dead_at is not null,
       (select count(*) from (select from jobguard.running r where r.worker = w.id limit 2) c)::int
from jobguard.workers w where w.source = %(source)s order by w.id

-- name: charges
-- Return how often the claimed jobs of these workers are charged: the two highest numbers for each.
select r.worker, (array_agg(j.crashes::int order by j.crashes desc))[1:2]
from jobguard.running r join jobguard.jobs j on j.source = r.source and j.token = r.token
where r.source = %(source)s and r.worker = any (%(workers)b::uuid[])
group by r.worker

-- name: listed
-- Return those of these tokens that a worker lists that has neither left nor died, and whether such a worker
-- has reports that are not written yet.
with live as (
  select w.claims, w.unflushed_since from jobguard.workers w
  where w.source = %(source)s and w.left_at is null and w.dead_at is null
)
select array(select unnest(l.claims) from live l intersect select unnest(%(tokens)b::uuid[])),
       exists (select from live l where l.unflushed_since is not null)

-- name: declare_dead
-- The row keeps the claims of that moment: they may have caused the death; see "restores".
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), declared as (
  update jobguard.workers w
  set dead_at = now(), claims = array(select r.token from jobguard.running r where r.worker = w.id)
  from lease where w.id = any (%(workers)b::uuid[]) and w.dead_at is null
  returning w.id
)
select d.id, (select count(*) from jobguard.running r where r.worker = d.id)
from lease left join declared d on true

-- name: forget
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), forgotten as (
  delete from jobguard.workers w using lease
  where w.id = any (%(workers)b::uuid[])
    -- The library's registry lists the worker for some more minutes. Until then its row must exist, or the
    -- worker would count as unguarded.
    and coalesce(w.dead_at, w.left_at) < now() - interval '15 minutes'
    and not exists (select from jobguard.running r where r.worker = w.id)
)
select true from lease

-- name: page
-- Return owed deliveries in the order of their tokens, except for those that their processes push now.
select o.* from jobguard.owed(%(source)s, array(
  select j.token from jobguard.jobs j
  left join lateral (
    select o.token from jobguard.outbox o
    where o.token = j.token and o.source = %(source)s and o.not_before > now() offset 0
  ) o on true
  where j.source = %(source)s and j.token > %(after)s and o.token is null
  order by j.token limit %(limit)s), false) o

-- name: tally
-- Count a slice of the owed deliveries by queue. The last column is the last token of the slice.
with slice as materialized (
  select token, queue from jobguard.jobs where source = %(source)s and token > %(after)s
  order by token limit %(limit)s
)
select queue, count(*), (select token from slice order by token desc limit 1)
from slice group by queue

-- name: watched
-- Return the deliveries of every inspection: suspects, the outbox, and the claims of dead workers.
-- Each branch is bounded, and in the order of the tokens.
select o.* from jobguard.owed(%(source)s, array(
  select token from (
    (select s.token from jobguard.suspects s
     left join lateral (
       select j.not_before from jobguard.jobs j
       where j.token = s.token and j.source = %(source)s offset 0
     ) j on true
     left join lateral (
       select o.not_before from jobguard.outbox o
       where o.token = s.token and o.source = %(source)s offset 0
     ) o on true
     where s.source = %(source)s and s.token > %(after)s and s.cause <> 'untrusted' and not %(urgent)s
       and coalesce(j.not_before, now()) <= now() and coalesce(o.not_before, now()) <= now()
     order by s.token limit %(limit)s)
    union all
    (select s.token from jobguard.suspects s
     left join lateral (
       select j.not_before from jobguard.jobs j
       where j.token = s.token and j.source = %(source)s offset 0
     ) j on true
     where s.source + 0 = %(source)s and s.token > %(after)s and s.cause = 'worker' and s.mark = ''
       and %(urgent)s and coalesce(j.not_before, now()) <= now()
     order by s.token limit %(limit)s)
    union all
    (select o.token from jobguard.outbox o
     where o.source = %(source)s and o.token > %(after)s and coalesce(o.not_before, now()) <= now()
     order by o.token limit %(limit)s)
    union all
    (select r.token from jobguard.workers w
     cross join lateral (
       select r.token from jobguard.running r
       where r.worker = w.id and r.source + 0 = %(source)s offset 0
     ) r
     where (w.left_at is not null or w.dead_at is not null) and r.token > %(after)s
     order by r.token limit %(limit)s)
  ) t group by token order by token limit %(limit)s), true) o
where o.backoff <= 0

-- name: claimants
-- Return the next workers that have claims, in the order of their ids. Each one costs one search of the index.
with recursive claimant as (
  (select r.worker from jobguard.running r where r.worker > %(after)s order by r.worker limit 1)
  union all
  select (select r.worker from jobguard.running r where r.worker > c.worker order by r.worker limit 1)
  from claimant c where c.worker is not null
)
select worker from claimant where worker is not null limit %(limit)s

-- name: unheld
-- Return the claims of these workers that they do not hold, though they have neither left nor died: a worker
-- dropped it, or never registered. See jobguard.holds; here no two lists are compared element by element.
select o.* from jobguard.owed(%(source)s, array(
  select token from (
    select r.worker, r.token from jobguard.running r
    left join jobguard.workers w on w.id = r.worker
    where r.worker = any (%(workers)b::uuid[]) and r.source + 0 = %(source)s
      and w.left_at is null and w.dead_at is null
      and (w.id is null or r.claimed_at < w.previous_beat_at)
    except
    select w.id, unnest(w.claims) from jobguard.workers w where w.id = any (%(workers)b::uuid[])
  ) u order by token limit %(limit)s), true) o
where o.backoff <= 0

-- name: suspect
-- Store suspects. The time of the first inspection is kept as long as the observation does not change.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), owed as (
  -- A delivery that has ended since the inspection is no suspect: its row would stay forever.
  select j.token from jobguard.jobs j
  where j.source + 0 = %(source)s and j.token = any (%(token)b::uuid[])
  order by j.token for key share
), suspected as (
insert into jobguard.suspects as s (source, token, cause, mark)
select %(source)s, u.token, u.cause::jobguard.cause, u.mark
from lease, owed o
join unnest(%(token)b::uuid[], %(cause)b::text[], %(mark)b::text[]) u(token, cause, mark)
  on u.token = o.token
on conflict (source, token) do update
set cause = case when s.cause in ('worker', 'untrusted') then s.cause else excluded.cause end,
    seen_at = case when s.mark = excluded.mark then s.seen_at else now() end,
    mark = excluded.mark
)
select true from lease

-- name: clear
-- Delete suspicions and outbox rows. Rows of jobs are locked first, as in every statement that locks rows of
-- suspects and of the outbox. What a worker has declined since the inspection stays suspected.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), locked as materialized (
  select j.token, j.declined > 0 and j.not_before > now() as declined from jobguard.jobs j
  where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[]) order by j.token for key share
), unboxed as (
  delete from jobguard.outbox b using lease
  where b.source = %(source)s and b.token = any (%(tokens)b::uuid[])
    and (select count(*) from locked) >= 0
), unsuspected as (
  delete from jobguard.suspects s using lease
  where s.source = %(source)s and s.token = any (%(tokens)b::uuid[])
    and s.token <> all (array(select token from locked where declined))
)
select true from lease

-- name: envelopes
-- Return envelopes in the given order, up to the limit in bytes, but at least the first one.
select f.token, f.job_id, f.queue, f.envelope, extract(epoch from f.due_at)::float8,
       extract(epoch from f.expires_at)::float8, f.trace
from (
  select w.nth, j.token, j.job_id, j.queue, j.envelope, j.due_at, j.expires_at, j.trace,
         row_number() over (order by w.nth) as place,
         sum(octet_length(j.envelope)) over (order by w.nth) as bytes
  from unnest(%(tokens)b::uuid[]) with ordinality as w (token, nth)
  join jobguard.jobs j on j.source + 0 = %(source)s and j.token = w.token
    and j.token = any (%(tokens)b::uuid[])
  where not exists (
    select from jobguard.history h where h.source = j.source and h.token = j.token)
) f
where f.bytes <= %(most)s or f.place = 1
order by f.nth

-- name: open_joins
select coalesce(x.name, x.id), x.size, x.state from jobguard.joins x
where x.source = %(source)s and x.closed_at is null and x.id > %(after)s
order by x.id limit %(limit)s

-- name: complete_joins
-- Return joins whose members have all ended and that were not closed for a while after that.
select coalesce(x.name, x.id), x.size, x.state from jobguard.joins x
cross join lateral (
  select count(*) as ended, max(p.ended_at) as last from jobguard.join_parts p
  where p.source = x.source and p.join_id = x.id
) p
where x.source = %(source)s and x.closed_at is null and x.size > 0 and p.ended >= x.size
  and p.last < now() - make_interval(secs => %(quiet)s)
order by x.id limit %(limit)s

-- name: join_parts
select p.join_id, p.token, p.job_id, p.queue, p.state, p.envelope from jobguard.join_parts p
where p.source = %(source)s and p.join_id = any (%(joins)s::text[])
order by p.join_id, p.ended_at, p.token

-- name: tombstones
select distinct on (h.token) h.token, h.outcome::text from jobguard.history h
where h.source = %(source)s and h.token = any (%(tokens)b::uuid[])
order by h.token, h.ended_at

-- name: rules
-- Return the rules for the recovery of those owed deliveries that have one.
select j.token, j.recover from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[]) and j.recover is not null

-- name: known
-- Return those tokens that the ledger knows.
select j.token from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
union
select h.token from jobguard.history h
where h.source = %(source)s and h.token = any (%(tokens)b::uuid[])

-- name: overtaken
-- Return those after which a later delivery of the same job id began: if Redis keeps one body per job id, the
-- later delivery replaced it there. "Later" is by the database's clock, because many machines make tokens.
select j.token from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
  and (select s.one_body from jobguard.sources s where s.id = %(source)s) is not false
  and (exists (
         select from jobguard.jobs y
         join jobguard.running r on r.source = y.source and r.token = y.token
         where y.source + 0 = j.source and y.job_id = j.job_id and y.recorded_at > j.recorded_at)
    or exists (
         select from jobguard.history h
         where h.source + 0 = j.source and h.job_id = j.job_id and h.recorded_at > j.recorded_at
           and h.claimed_at is not null))

-- name: sharing_job_id
-- Return those for which a result that is kept by job id may belong to another delivery: another delivery of
-- the same job id is owed too, or has ended since. A delivery may end "early" seconds before its record.
select j.token from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
  and (exists (
         select from jobguard.jobs y
         where y.source + 0 = j.source and y.job_id = j.job_id and y.token <> j.token)
    or exists (
         select from jobguard.history h
         where h.source + 0 = j.source and h.job_id = j.job_id and h.token <> j.token
           and h.outcome <> 'superseded'
           and h.ended_at > j.recorded_at - make_interval(secs => %(early)s)))

-- name: last_outcomes
-- Return for each job id whether it is owed, and its last outcome. A superseded delivery is no outcome.
select i.job_id,
       exists (select from jobguard.jobs j where j.source + 0 = %(source)s and j.job_id = i.job_id),
       (select h.outcome::text from jobguard.history h
        where h.source + 0 = %(source)s and h.job_id = i.job_id and h.outcome <> 'superseded'
        order by h.ended_at desc limit 1)
from unnest(%(job_ids)b::text[]) i(job_id)

-- name: restored
-- Count a restore of each delivery, and delete its suspicion. "cause" is null where a delivery was not lost:
-- its dependencies have ended, and the library did not release it. A worker may have taken and declined it
-- since it was pushed: then it waits again, and stays suspected.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), locked as materialized (
  select j.token, j.queue, j.declined > 0 and j.not_before > now() as declined from jobguard.jobs j
  where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])
  order by j.token for no key update
), counted as (
  -- No join with the locked rows: a wrong estimate would compare each row with each row.
  update jobguard.jobs j
  set recoveries = j.recoveries + 1,
      not_before = case when j.declined > 0 and j.not_before > now() then j.not_before end
  from lease
  where j.source + 0 = %(source)s and j.token = any (array(select token from locked))
), noted as (
  insert into jobguard.recoveries (source, token, cause)
  select %(source)s, c.token, c.cause::jobguard.cause
  from lease, unnest(%(tokens)b::uuid[], %(causes)b::text[]) c(token, cause)
  where c.cause is not null
), active as (
  insert into jobguard.activity as a (minute, source, queue, what, count)
  select date_trunc('minute', now()), %(source)s,
         case when octet_length(l.queue) <= 1000 then l.queue
              else left(l.queue, 40) || '#' || encode(sha256(convert_to(l.queue, 'UTF8')), 'hex') end,
         'restored', count(*)
  from lease, locked l group by 3
  on conflict (minute, source, queue, what) do update set count = a.count + excluded.count
), unboxed as (
  delete from jobguard.outbox b using lease
  where b.source = %(source)s and b.token = any (%(tokens)b::uuid[])
    and (select count(*) from locked) >= 0
), unsuspected as (
  delete from jobguard.suspects s using lease
  where s.source = %(source)s and s.token = any (%(tokens)b::uuid[])
    and s.token <> all (array(select token from locked where declined))
)
select true from lease

-- name: restores
-- Return how often each delivery itself was restored, without a decline or a death that explains why it is
-- absent again. A new delivery continues the count of the one that it supersedes, so the count of that one is
-- subtracted. A death explains it if the worker ran a job: then it may have had this delivery beside it, without
-- a claim.
select j.token, j.recoveries - j.declined
  - coalesce((select max(h.recoveries) from jobguard.history h
              where h.source = j.source and h.job_id = j.job_id and h.next = j.token), 0)
  - (select count(*)
     from (select r.restored_at, lead(r.restored_at, 1, now()) over (order by r.restored_at) as absent_at
           from jobguard.recoveries r where r.source = j.source and r.token = j.token) r
     where exists (select from jobguard.workers w
                   where w.source = j.source and j.queue = any (w.queues) and w.claims <> '{}'
                     and w.dead_at > r.restored_at and w.beat_at < r.absent_at))
from jobguard.jobs j
where j.source + 0 = %(source)s and j.token = any (%(tokens)b::uuid[])

-- name: void
-- Remove claims of dead workers, if they still have that number.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), said as (
  select u.* from lease, unnest(%(token)b::uuid[], %(number)b::int[], %(charge)b::bool[],
                                %(backoff)b::float8[]) u(token, number, charge, backoff)
), locked as (
  select j.token from jobguard.jobs j join said u on u.token = j.token
  where j.source + 0 = %(source)s and j.token = any (%(token)b::uuid[]) order by j.token for update of j
), gone as (
  delete from jobguard.running r using said u, locked l
  where r.source + 0 = %(source)s and r.token = u.token and l.token = u.token and r.number = u.number
    and r.token = any (%(token)b::uuid[])
  returning r.token, r.number, r.worker, u.charge, u.backoff
), charged as (
  update jobguard.jobs j
  set claims = g.number, last_worker = g.worker, crashes = j.crashes + g.charge::int,
      not_before = now() + make_interval(secs => g.backoff)
  from gone g where j.source + 0 = %(source)s and j.token = g.token
    and j.token = any (%(token)b::uuid[])
  returning j.token
), suspected as (
  insert into jobguard.suspects as s (source, token, cause)
  select %(source)s, g.token, 'worker' from gone g
  on conflict (source, token) do update set cause = 'worker', mark = '', seen_at = now()
)
select array(select token from charged) from lease

-- name: close_owed
-- End deliveries that no worker runs, on behalf of the leader. A dead delivery with a claim has caused one more
-- death than was charged.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), said as (
  select u.* from lease, unnest(%(token)b::uuid[], %(outcome)s::text[], %(error)s::text[],
                                %(join)s::text[], %(part)s::bytea[])
    u(token, outcome, error, join_id, part)
), locked as (
  select j.token, r.number, r.worker, r.claimed_at
  from jobguard.jobs j
  left join lateral (
    select * from jobguard.running r where r.token = j.token and r.source = %(source)s offset 0
  ) r on true
  left join lateral (select * from jobguard.workers w where w.id = r.worker offset 0) w on true
  where j.source + 0 = %(source)s and exists (select from lease)
    and jobguard.holds((w.*)::jobguard.workers, (r.*)::jobguard.running) is not true
    and j.token = any (%(token)b::uuid[])
  order by j.token for update of j
), gone as (
  delete from jobguard.jobs j using said u, locked l
  where j.source + 0 = %(source)s and j.token = u.token and l.token = u.token
    and j.token = any (%(token)b::uuid[])
  returning j.*, u.outcome, u.error, u.join_id, u.part, l.number, l.worker, l.claimed_at
), parts as (
  insert into jobguard.join_parts (source, join_id, job_id, token, queue, state, envelope)
  select g.source, g.join_id, g.job_id, g.token, g.queue, g.part, g.envelope from gone g
  where g.join_id is not null and not jobguard.is_closed(g.source, g.join_id)
  on conflict do nothing
), unclaimed as (
  delete from jobguard.running r using gone g where r.source + 0 = %(source)s and r.token = g.token
    and r.token = any (%(token)b::uuid[])
), unsuspected as (
  delete from jobguard.suspects s using gone g where s.source + 0 = %(source)s and s.token = g.token
    and s.token = any (%(token)b::uuid[])
), unboxed as (
  delete from jobguard.outbox b using gone g where b.source + 0 = %(source)s and b.token = g.token
    and b.token = any (%(token)b::uuid[])
), tombstones as (
  insert into jobguard.history (source, token, job_id, queue, task, outcome, attempt, recoveries,
                                crashes, number, worker, recorded_at, claimed_at, errors, envelope)
  select g.source, g.token, g.job_id, g.queue, g.task, g.outcome::jobguard.outcome, g.attempt,
         g.recoveries, g.crashes + (g.outcome = 'dead' and g.number is not null)::int, g.number, g.worker, g.recorded_at,
         g.claimed_at,
         case when g.error is not null then array[g.error] end,
         case when g.outcome in ('failed', 'dead') then g.envelope end
  from gone g
  where not exists (select from jobguard.history h where h.source = g.source and h.token = g.token
                    and h.token = any (%(token)b::uuid[]))
)
select array(select token from gone) from lease

-- name: queues
select source, coalesce(name, queue), extract(epoch from trusted_since)::float8,
       extract(epoch from clean_since)::float8, unguarded, extract(epoch from unguarded_at)::float8
from jobguard.queues where source = %(source)s order by queue

-- name: trust
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), added as (
  insert into jobguard.queues (source, queue, name, trusted_since, clean_since, unguarded, unguarded_at)
  select %(source)s, u.queue, u.name, to_timestamp(u.trusted), to_timestamp(u.clean),
         array(select jsonb_array_elements_text(u.unguarded::jsonb)), to_timestamp(u.unguarded_at)
  from lease, unnest(%(queue)b::text[], %(full)s::text[], %(trusted)s::float8[], %(clean)s::float8[],
                     %(unguarded)b::text[], %(unguarded_at)s::float8[])
    u(queue, name, trusted, clean, unguarded, unguarded_at)
  on conflict (source, queue) do update
  set trusted_since = excluded.trusted_since, clean_since = excluded.clean_since,
      unguarded = excluded.unguarded, unguarded_at = excluded.unguarded_at
)
select true from lease

-- name: hold
update jobguard.leader
set held = jsonb_set(held, array[%(key)s], jsonb_build_object('since', now(), 'reason', %(reason)s::text))
where namespace = %(namespace)s and term = %(term)s
returning true

-- name: retain
-- Store the retention that this namespace wants, and whether history keeps all envelopes; see
-- jobguard.longest_retention and jobguard.end.
update jobguard.leader
set retention = make_interval(secs => %(retention)s), keep_envelopes = %(keep_envelopes)s
where namespace = %(namespace)s and holder = %(holder)s
  and (retention is distinct from make_interval(secs => %(retention)s)
       or keep_envelopes <> %(keep_envelopes)s)

-- name: rotate
select jobguard.rotate_step(make_interval(secs => %(retention)s))

-- name: dead_rows
-- Return those small tables that are worth a vacuum.
select relname, n_dead_tup from pg_stat_user_tables
where schemaname = 'jobguard' and relname in ('jobs', 'running', 'suspects', 'outbox', 'workers')
  and n_dead_tup > %(least)s

-- name: count_owed
-- Count what is owed, for people who look. It is a read of its own, because it takes long when much is owed.
select j.source, j.queue,
       count(*) filter (where r.token is null and coalesce(j.due_at <= now(), true)),
       count(*) filter (where r.token is null and j.due_at > now()),
       count(*) filter (where r.token is not null),
       count(*) filter (where u.token is not null
                           or (r.token is not null
                               and (w.id is null or w.dead_at is not null or w.left_at is not null))),
       extract(epoch from now() - min(greatest(j.recorded_at, j.due_at))
                 filter (where r.token is null and coalesce(j.due_at <= now(), true)))::float8
from jobguard.sources s
join jobguard.jobs j on j.source = s.id
left join jobguard.running r on r.source = j.source and r.token = j.token
left join jobguard.workers w on w.id = r.worker
left join jobguard.suspects u on u.source = j.source and u.token = j.token
where s.namespace = %(namespace)s
group by j.source, j.queue

-- name: store_counts
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), stored as (
  insert into jobguard.owed_counts (source, counts)
  select s.id, coalesce(u.counts::jsonb, '[]')
  from lease, jobguard.sources s
  left join unnest(%(source)s::bigint[], %(counts)s::text[]) u(source, counts) on u.source = s.id
  where s.namespace = %(namespace)s
  on conflict (source) do update set counts = excluded.counts, counted_at = excluded.counted_at
)
select true from lease

-- name: count_ended
-- Count the ends of each minute that began within these seconds.
select h.source, h.queue, h.outcome::text, extract(epoch from date_trunc('minute', h.ended_at))::float8,
       count(*)
from jobguard.history h join jobguard.sources s on s.id = h.source
where s.namespace = %(namespace)s
  and h.ended_at >= date_trunc('minute', now() - make_interval(secs => %(seconds)s))
group by 1, 2, 3, 4

-- name: store_activity
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), stored as (
  insert into jobguard.activity (minute, source, queue, what, count)
  select to_timestamp(u.minute), u.source, u.queue, u.what, u.count
  from lease, unnest(%(minute)s::float8[], %(source)s::bigint[], %(queue)s::text[], %(what)s::text[],
                     %(count)s::bigint[]) u(minute, source, queue, what, count)
  on conflict (minute, source, queue, what) do update set count = excluded.count
)
select true from lease

-- name: forget_recoveries
-- Delete what is older than history. Return how many recoveries were deleted, of at most 5,000.
with oldest as materialized (
  select now() - jobguard.longest_retention(make_interval(secs => %(retention)s)) as at
), inactive as (
  delete from jobguard.activity a using oldest o where a.minute < o.at
), undone as (
  delete from jobguard.actions a where a.at < now() - interval '1 year'
), gone as (
  delete from jobguard.recoveries r
  where r.ctid = any (array(select r.ctid from jobguard.recoveries r, oldest o
                            where r.restored_at < o.at limit 5000))
  returning true
)
select count(*) from gone

-- name: know_tasks
-- Remember tasks that a worker has completed.
insert into jobguard.tasks (source, task, queue)
select %(source)s, u.task, u.queue from unnest(%(task)b::text[], %(queue)b::text[]) u(task, queue)
on conflict do nothing

-- name: requests
-- Return waiting requests in their order, up to the limit in bytes, but at least the first one.
select f.id, f.source, f.job_id, f.queue, f.task, f.args::text, f.kwargs::text,
       extract(epoch from f.requested_at)::float8, extract(epoch from f.due_at)::float8, f.priority, f.key,
       f.max_attempts, f.serializer
from (
  select r.*, row_number() over (order by r.id) as place,
         sum(pg_column_size(r.args) + pg_column_size(r.kwargs)) over (order by r.id) as bytes
  from (
    select q.*, s.serializer from jobguard.requests q join jobguard.sources s on s.id = q.source
    where q.error is null and q.source = any (%(sources)b::bigint[])
    order by q.id limit %(limit)s
  ) r
) f
where f.bytes <= %(most)s or f.place = 1
order by f.id

-- name: accept
-- Take requests and record their deliveries, for the leader to push. Nothing was sent to Redis so far. One whose
-- key is held by now is cancelled.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), taken as (
  delete from jobguard.requests r using lease
  where r.id = any (%(id)b::bigint[]) and r.error is null
  returning r.id, r.requested_at
), given as (
  select f.*, t.requested_at from taken t
  join unnest(%(id)b::bigint[], %(token)b::uuid[], %(job_id)b::text[], %(queue)b::text[],
              %(task)b::text[], %(priority)b::int[], %(due)s::float8[], %(key)s::text[],
              %(envelope)b::bytea[])
    f(id, token, job_id, queue, task, priority, due, key, envelope) on f.id = t.id
), held as materialized (
  select h.token, h.holder
  from (select array_agg(g.token order by g.id) as token, array_agg(g.job_id order by g.id) as job_id,
               array_agg(g.key order by g.id) as key
        from given g where g.key is not null) k
  cross join lateral jobguard.take_keys(%(source)s, k.token, k.job_id, k.key) h
), cancelled as (
  insert into jobguard.history (source, token, job_id, queue, task, outcome, recorded_at, errors)
  select %(source)s, g.token, g.job_id, g.queue, g.task, 'cancelled', g.requested_at,
         array['its key is held' || coalesce(' by job ' || h.holder, '')]
  from given g join held h on h.token = g.token
), added as (
  insert into jobguard.jobs (source, token, job_id, queue, task, priority, due_at, key, envelope)
  select %(source)s, g.token, g.job_id, g.queue, g.task, g.priority, to_timestamp(g.due), g.key,
         g.envelope
  from given g where not exists (select from held h where h.token = g.token)
), boxed as (
  insert into jobguard.outbox (source, token, unsent)
  select %(source)s, g.token, true
  from given g where not exists (select from held h where h.token = g.token)
)
select (select count(*) from taken) from lease

-- name: hold_request
-- Keep a request that cannot be rendered, with the reason.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), held as (
  update jobguard.requests r set error = %(error)s from lease where r.id = %(id)s
)
select true from lease

-- name: due_schedules
-- Return schedules that have a slot to fire, or that are not planned yet.
select s.name, s.cron, s.every, s.rule::text, s.timezone, extract(epoch from s.created_at)::float8,
       extract(epoch from s.starts_at)::float8, extract(epoch from s.ends_at)::float8, s.jitter, s.catch_up,
       s.version, extract(epoch from s.next_at)::float8
from jobguard.schedules s
where s.namespace = %(namespace)s and s.paused_at is null and s.error is null and not s.finished
  and coalesce(s.fire_at <= now(), true)
order by s.fire_at nulls first limit %(limit)s

-- name: fire
-- Fire slots of a schedule and plan the next one, unless another plan was made or the schedule has changed.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), planned as (
  select s.* from lease, jobguard.schedules s
  where s.namespace = %(namespace)s and s.name = %(schedule)s and s.version = %(version)s
    and s.paused_at is null and s.next_at is not distinct from to_timestamp(%(planned)s::float8)
  for update of s
), fired as (
  insert into jobguard.slots (namespace, schedule, slot_at, job_id)
  select p.namespace, p.name, to_timestamp(f.slot), gen_random_uuid()::text
  from planned p, unnest(%(slots)b::float8[]) f(slot)
  on conflict do nothing
  returning slot_at, job_id
), requested as (
  insert into jobguard.requests (source, job_id, queue, task, args, kwargs, priority, max_attempts)
  select p.source, f.job_id, p.queue, p.task, p.args, p.kwargs, p.priority, p.max_attempts
  from planned p, fired f order by f.slot_at
), moved as (
  update jobguard.schedules s
  set next_at = to_timestamp(%(next)s::float8), fire_at = to_timestamp(%(fire)s::float8),
      finished = %(next)s::float8 is null, skipped = s.skipped + %(skipped)s,
      last_at = coalesce((select max(slot_at) from fired), s.last_at)
  from planned p where s.namespace = p.namespace and s.name = p.name
)
select (select count(*) from fired) from lease

-- name: fail_schedule
-- Store why a schedule cannot be planned, unless it has changed.
with lease as (
  select from jobguard.leader where namespace = %(namespace)s and term = %(term)s for share
), failed as (
  update jobguard.schedules s set error = %(error)s from lease
  where s.namespace = %(namespace)s and s.name = %(schedule)s and s.version = %(version)s
)
select true from lease

-- name: forget_slots
-- Delete old slots. No slot before the planned one is ever fired again.
delete from jobguard.slots where fired_at < now() - interval '7 days'
