-- Put back what Celery counts of one chord, where it is missing.
--
-- KEYS: 1 size  2 results so far  3 which tasks they are of  4 who sends the body  5 what was added
--       to the size  6 list of the last part, to be told again
-- ARGV: 1 deadline in Redis' time  2 db of the results  3 db of the broker  4 size  5 seconds for
--       which the keys are kept (0: for ever)  6 the results are a zset ('1') or a list
--       7 message of the last part, to be told again ('' none)
--       then of each part its member of KEYS[3], its place in the header, and its result
-- Returns rejoined, sent (the body is, or is about to be) or too_late.
local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1e6 > tonumber(ARGV[1]) then return 'too_late' end
local finish = ARGV[7] ~= ''

redis.call('SELECT', ARGV[2])
if redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('SELECT', ARGV[3])
  return 'sent'
end
local last = #ARGV - 2
if finish then
  redis.call('SET', KEYS[1], ARGV[4])
  redis.call('DEL', KEYS[5])
else
  redis.call('SET', KEYS[1], ARGV[4], 'NX')
end
for at = 8, #ARGV, 3 do
  local id, place, result = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local there = redis.call('SISMEMBER', KEYS[3], id) == 1
  if finish and at == last then
    redis.call('SREM', KEYS[3], id)
    redis.call(ARGV[6] == '1' and 'ZREM' or 'LREM', KEYS[2], unpack(ARGV[6] == '1' and { result } or { 0, result }))
  elseif ARGV[6] == '1' then
    redis.call('ZADD', KEYS[2], 'NX', place, result)
    redis.call('SADD', KEYS[3], id)
  elseif not there and not redis.call('LPOS', KEYS[2], result) then
    redis.call('RPUSH', KEYS[2], result)
    redis.call('SADD', KEYS[3], id)
  end
end
if tonumber(ARGV[5]) > 0 then
  for _, key in ipairs({ KEYS[1], KEYS[2], KEYS[3] }) do redis.call('EXPIRE', key, ARGV[5]) end
end
redis.call('SELECT', ARGV[3])
if finish then redis.call('LPUSH', KEYS[6], ARGV[7]) end
return 'rejoined'
