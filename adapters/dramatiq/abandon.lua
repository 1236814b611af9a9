-- Take one message out of the hands of whoever has not been heard of: Dramatiq would put it back by
-- itself, by chance and too early.
--
-- KEYS: 1 heartbeats
-- ARGV: 1 id  2 prefix of the sets of what a worker has fetched  3 queue  4 silent for so long (ms)
--       5 deadline in Redis' time
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[5]) then return 0 end
local silent = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) - tonumber(ARGV[4])
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', silent)) do
  redis.call('SREM', ARGV[2] .. worker .. '.' .. ARGV[3], ARGV[1])
  redis.call('SREM', ARGV[2] .. worker .. '.' .. ARGV[3] .. '.DQ', ARGV[1])
end
