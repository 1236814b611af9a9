-- Put one message back under its own id, unless it is where a worker would find it.
--
-- KEYS: 1 list  2 its messages  3 messages of the dead letters  4 heartbeats
-- ARGV: 1 deadline in Redis' time  2 id  3 message  4 expires at (ms; '' never)
--       5 prefix of the sets of what a worker has fetched  6 name of the list
--       7 the dead worker that has fetched it, or ''
-- Returns restored, present, expired or too_late.
local list, messages, rid, dead = KEYS[1], KEYS[2], ARGV[2], ARGV[7]

local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
if now > tonumber(ARGV[1]) then return 'too_late' end

local function fetched(worker)
  return ARGV[5] .. worker .. '.' .. ARGV[6]
end

if redis.call('HEXISTS', KEYS[3], rid) == 1 then return 'present' end
local there = redis.call('HEXISTS', messages, rid) == 1
local taken = dead ~= '' and redis.call('SREM', fetched(dead), rid) == 1
local listed = false
if there then
  for _, worker in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
    if redis.call('SISMEMBER', fetched(worker), rid) == 1 then return 'present' end
  end
  listed = not taken and redis.call('LPOS', list, rid)
  if listed then return 'present' end
elseif redis.call('LLEN', list) > redis.call('HLEN', messages) then
  listed = redis.call('LPOS', list, rid) -- the message was evicted, the list was not
end
if ARGV[4] ~= '' and now * 1000 >= tonumber(ARGV[4]) then
  if listed then redis.call('LREM', list, 0, rid) end
  redis.call('HDEL', messages, rid)
  return 'expired'
end

if not there then redis.call('HSET', messages, rid, ARGV[3]) end
if not listed then redis.call('RPUSH', list, rid) end
return 'restored'
