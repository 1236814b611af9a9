-- Refuse at the call what no library can run: a time that no calendar has, such as infinity, and an empty queue.
set local lock_timeout = '3s';
update jobguard.requests
set error = format('due is %s', due_at), due_at = null
where due_at < '0001-01-02 00:00:00+00' or due_at >= '9999-01-01 00:00:00+00';
update jobguard.requests set error = 'the queue is empty', queue = '?' where queue = '';
update jobguard.schedules
set error = format('it starts at %s and ends at %s', coalesce(starts_at::text, 'any time'),
                   coalesce(ends_at::text, 'no time')), starts_at = null, ends_at = null
where least(starts_at, ends_at) < '0001-01-02 00:00:00+00'
   or greatest(starts_at, ends_at) >= '9999-01-01 00:00:00+00';
update jobguard.schedules set error = 'the queue is empty', queue = '?' where queue = '';

alter table jobguard.requests
  add constraint due_must_be_in_the_years_1_to_9998 check (
    due_at >= '0001-01-02 00:00:00+00' and due_at < '9999-01-01 00:00:00+00'),
  add constraint queue_must_not_be_empty check (queue <> '');
alter table jobguard.schedules
  add constraint starts_at_must_be_in_the_years_1_to_9998 check (
    starts_at >= '0001-01-02 00:00:00+00' and starts_at < '9999-01-01 00:00:00+00'),
  add constraint ends_at_must_be_in_the_years_1_to_9998_or_null check (
    ends_at >= '0001-01-02 00:00:00+00' and ends_at < '9999-01-01 00:00:00+00'),
  add constraint queue_must_not_be_empty check (queue <> '');
