-- Put back a group's barrier where it is missing: so many members are still to complete.
--
-- KEYS: 1 barrier  2 the members that were counted
-- ARGV: 1 deadline in Redis' time  2 how many  3 time to live (ms); then the members that completed
-- Returns 1 if it was missing.
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[1]) then return 0 end
if not redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3], 'NX') then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SADD', KEYS[2], '')
for i = 4, #ARGV do redis.call('SADD', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
