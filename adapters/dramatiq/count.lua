-- Count one member of a group, once: one that was killed after it was counted runs again.
--
-- KEYS: 1 barrier  2 the members that were counted: '' (so that there is one), '!' (cleared), ids
-- ARGV: 1 member  2 time to live (ms)
-- Returns cleared; counted; lost: the barrier is gone, and a leader puts it back with what it knows;
-- or plain: it is none of ours.
local left = tonumber(redis.call('GET', KEYS[1]) or '')
if not left then return 'lost' end
if redis.call('SISMEMBER', KEYS[2], '') == 0 then return 'plain' end
if redis.call('SADD', KEYS[2], ARGV[1]) == 0 then
  return redis.call('SISMEMBER', KEYS[2], '!') == 1 and 'cleared' or 'counted'
end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if left <= 1 then
  redis.call('SADD', KEYS[2], '!')
  return 'cleared'
end
redis.call('SET', KEYS[1], left - 1, 'PX', ARGV[2])
return 'counted'
