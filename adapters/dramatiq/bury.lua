-- Move one message to the dead letters, wherever it is.
--
-- KEYS: 1 list  2 its messages  3 delay list  4 its messages  5 dead letters  6 their messages
--       7 heartbeats
-- ARGV: 1 id  2 prefix of the sets of what a worker has fetched  3 queue
--       4 deadline in Redis' time
-- Returns 1 if there was anything to show.
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[4]) then return 0 end
local rid = ARGV[1]
local message = redis.call('HGET', KEYS[2], rid) or redis.call('HGET', KEYS[4], rid)
if not message then return 0 end
redis.call('ZADD', KEYS[5], tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), rid)
redis.call('HSET', KEYS[6], rid, message)
redis.call('HDEL', KEYS[2], rid)
redis.call('HDEL', KEYS[4], rid)
redis.call('LREM', KEYS[1], 0, rid)
redis.call('LREM', KEYS[3], 0, rid)
for _, worker in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
  redis.call('SREM', ARGV[2] .. worker .. '.' .. ARGV[3], rid)
  redis.call('SREM', ARGV[2] .. worker .. '.' .. ARGV[3] .. '.DQ', rid)
end
return 1
