-- Take a dead worker's run of one delivery out of RQ's books: its maintenance would fail the job, or
-- retry it, while it waits to be put back.
--
-- KEYS: 1 job hash  2 wip zset  3 executions zset  4 intermediate list
-- ARGV: 1 id  2 token in hex  3 key base  4 deadline in Redis' time, of a leader; a worker
--       has none
-- Returns 1 if it was this delivery's run.
local time = redis.call('TIME')
if ARGV[4] and tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[4]) then return 0 end
local hash = redis.call('HMGET', KEYS[1], 'jg', 'status')
if hash[1] ~= ARGV[2] then return 0 end
for _, execution in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  redis.call('ZREM', KEYS[2], ARGV[1] .. ':' .. execution)
  redis.call('DEL', ARGV[3] .. ':execution:' .. ARGV[1] .. ':' .. execution)
end
redis.call('DEL', KEYS[3])
redis.call('LREM', KEYS[4], 0, ARGV[1])
if hash[2] == 'started' then redis.call('HSET', KEYS[1], 'status', 'queued') end
return 1
