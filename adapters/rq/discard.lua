-- Take a delivery whose end the ledger has out of the places where it waits; with '1', delete all of it.
--
-- KEYS: 1 job hash  2 queue list  3 scheduled  4 deferred  5 ready zset  6 canceled zset  7 results
--       8 finished  9 failed zset
-- ARGV: 1 id  2 token in hex  3 '1': delete it  4 the longest list that is searched
-- A worker that takes an id from a longer list skips the job.
local hash = redis.call('HMGET', KEYS[1], 'jg', 'status')
if not hash[1] or string.sub(hash[1], 1, 32) ~= ARGV[2] then return 'newer' end
local erase = ARGV[3] == '1'
local waits = hash[2] == 'queued' or hash[2] == 'scheduled' or hash[2] == 'deferred'
  or hash[2] == 'ready_to_enqueue' or hash[2] == 'rate_limited'
if waits then
  if erase or redis.call('LLEN', KEYS[2]) <= tonumber(ARGV[4]) then
    redis.call('LREM', KEYS[2], 0, ARGV[1])
  end
  for i = 3, 5 do redis.call('ZREM', KEYS[i], ARGV[1]) end
end
if erase then
  redis.call('DEL', KEYS[1], KEYS[7])
  for _, i in ipairs({ 6, 8, 9 }) do redis.call('ZREM', KEYS[i], ARGV[1]) end
  return 'erased'
end
if not waits then return 'not waiting' end
-- As Job.cancel of RQ leaves it.
redis.call('HSET', KEYS[1], 'status', 'canceled', 'jg', ARGV[2] .. '!')
redis.call('ZADD', KEYS[6], redis.call('TIME')[1], ARGV[1])
return 'cancelled'
