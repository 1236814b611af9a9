-- Give a buried job to a worker once more, which tells RQ and does not call its function.
--
-- KEYS: 1 job hash  2 queue list  ARGV: 1 id  2 token in hex  3 deadline in Redis' time
-- The worker is refused the claim, for the delivery has ended; the mark says that it is to tell RQ.
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[3]) then return 0 end
local hash = redis.call('HMGET', KEYS[1], 'jg', 'data')
if not hash[2] or hash[1] ~= ARGV[2] .. '!' then return 0 end
redis.call('HSET', KEYS[1], 'jg_report', ARGV[2])
redis.call('RPUSH', KEYS[2], ARGV[1])
return 1
