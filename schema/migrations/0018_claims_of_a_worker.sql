-- Find the claims of a worker by a hash: an index in the order of workers was chosen for other statements.

-- After the vacuum of a drained queue the statistics say that no claim exists. Then a walk through this index
-- looked as cheap as a search by token, and gave the order of workers for a join: it read all claims.
drop index jobguard.running_by_worker;
create index running_by_worker on jobguard.running using hash (worker);
