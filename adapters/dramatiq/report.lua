-- Give a dead message to a worker once more, which calls its failure callback and nothing else.
--
-- KEYS: 1 list  2 its messages  3 the mark that a worker takes before it does so
-- ARGV: 1 deadline in Redis' time  2 id  3 message
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[1]) then return 0 end
if redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3]) == 0 then return 0 end
redis.call('SET', KEYS[3], 1, 'EX', 604800)
redis.call('RPUSH', KEYS[1], ARGV[2])
return 1
