-- Acknowledge one message as Dramatiq does, and leave no body behind where it no longer can.
--
-- KEYS: 1 what this worker has fetched  2 messages  3 list  4 heartbeats
-- ARGV: 1 id  2 this worker  3 now (ms)  4 another worker runs it: leave its message alone
--       5 prefix of the sets of what a worker has fetched  6 name of the list
local rid = ARGV[1]
redis.call('ZADD', KEYS[4], ARGV[3], ARGV[2])
local mine = redis.call('SREM', KEYS[1], rid) == 1
if ARGV[4] == '1' then return end
if not mine then
  -- Dramatiq took this worker for dead and gave the message to another, which skips it; or Redis
  -- lost who had fetched it. Whoever still has it in hand acknowledges it.
  if redis.call('HEXISTS', KEYS[2], rid) == 0 then return end
  for _, worker in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    if redis.call('SISMEMBER', ARGV[5] .. worker .. '.' .. ARGV[6], rid) == 1 then return end
  end
  if redis.call('LPOS', KEYS[3], rid) then return end
end
redis.call('HDEL', KEYS[2], rid)
