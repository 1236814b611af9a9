-- A guarded worker says that it is there.
-- KEYS: 1 zset of workers by the time they last said so  2 hash of what is known of them
-- ARGV: 1 session and number  2 what is known, in JSON ('' it leaves)  3 where its results are ('' elsewhere)
-- Where results are outlives the workers: it goes with Redis, as the results do.
local now = tonumber(redis.call('TIME')[1])
if ARGV[2] == '' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  return redis.call('HDEL', KEYS[2], ARGV[1])
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - 300)) do
  redis.call('ZREM', KEYS[1], gone)
  redis.call('HDEL', KEYS[2], gone)
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], 'results ' .. ARGV[3], now) end
redis.call('EXPIRE', KEYS[1], 3600)
return redis.call('EXPIRE', KEYS[2], 604800)
