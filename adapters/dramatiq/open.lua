-- Create a group's barrier as Dramatiq does, and beside it the set of the members that are counted.
--
-- KEYS: 1 barrier  2 the members that were counted
-- ARGV: 1 how many  2 time to live (ms)
-- Returns 1 if it is new.
if not redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2], 'NX') then return 0 end
redis.call('SADD', KEYS[2], '')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
