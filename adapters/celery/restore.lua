-- Put one message back into its list, as it was.
--
-- KEYS: 1 list  2 zset of what was put back lately  3 unacked hash  4 its index
--       5 table of its exchange, if that has a name
-- ARGV: 1 deadline in Redis' time  2 token in hex  3 message
--       4 when the look began that saw it nowhere (microseconds, Redis' time)
--       5 expires at (seconds; '' never)  6 tag under which a dead worker has it ('' none)
--       7 that worker  8 binding to its exchange ('' none)
-- Returns restored, present, expired or too_late.
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
if now > tonumber(ARGV[1]) then return 'too_late' end

-- Another leader has put it back since we looked.
local last = redis.call('ZSCORE', KEYS[2], ARGV[2])
if last and tonumber(last) >= tonumber(ARGV[4]) then return 'present' end

if ARGV[6] ~= '' then
  local raw = redis.call('HGET', KEYS[3], ARGV[6])
  local ours = raw and string.find(raw, ARGV[2], 1, true) and string.find(raw, ARGV[7], 1, true)
  if not ours then return 'present' end
  redis.call('HDEL', KEYS[3], ARGV[6])
  redis.call('ZREM', KEYS[4], ARGV[6])
end
if ARGV[5] ~= '' and tonumber(ARGV[5]) <= now then return 'expired' end

if ARGV[8] ~= '' then redis.call('SADD', KEYS[5], ARGV[8]) end
-- What a worker had taken was next in line, and is so again.
redis.call(ARGV[6] ~= '' and 'RPUSH' or 'LPUSH', KEYS[1], ARGV[3])
local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
redis.call('ZADD', KEYS[2], string.format('%.0f', micros), ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', micros - 60000000))
redis.call('EXPIRE', KEYS[2], 120)
return 'restored'
