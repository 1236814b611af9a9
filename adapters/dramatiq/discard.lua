-- Delete a message whose end the ledger has, unless a worker has fetched it; with '1', in any case.
--
-- KEYS: 1 list  2 its messages  3 delay list  4 its messages  5 dead letters  6 their messages  7 heartbeats
-- ARGV: 1 id  2 prefix of the sets of what a worker has fetched  3 queue  4 '1': delete it everywhere
--       5 the longest list that is searched
-- Dramatiq ignores an id in a list whose message is gone.
local rid, erase = ARGV[1], ARGV[4] == '1'
if not erase then
  for _, worker in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
    for _, name in ipairs({ ARGV[3], ARGV[3] .. '.DQ' }) do
      if redis.call('SISMEMBER', ARGV[2] .. worker .. '.' .. name, rid) == 1 then return 'taken' end
    end
  end
end
for _, i in ipairs({ 1, 3 }) do
  if redis.call('HDEL', KEYS[i + 1], rid) == 1
      and (erase or redis.call('LLEN', KEYS[i]) <= tonumber(ARGV[5])) then
    redis.call('LREM', KEYS[i], 0, rid)
  end
end
if erase then
  redis.call('ZREM', KEYS[5], rid)
  redis.call('HDEL', KEYS[6], rid)
end
return 'deleted'
