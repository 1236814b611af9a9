-- Find the requests that cannot be sent, however many wait.
set local lock_timeout = '3s';
create index requests_held on jobguard.requests (id) where error is not null;
