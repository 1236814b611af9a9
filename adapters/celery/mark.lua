-- Replace a waiting message by itself with a token, unless a worker has taken it since it was read.
--
-- KEYS: 1 list
-- ARGV: 1 where it was, from the head  2 the message  3 the message with its token
-- Returns 1 if it was replaced.
local at = tonumber(ARGV[1])
if redis.call('LINDEX', KEYS[1], at) ~= ARGV[2] then
  -- Messages were pushed before it. A message that is pushed later than this page was read counts too.
  at = redis.call('LPOS', KEYS[1], ARGV[2])
  if not at then return 0 end
end
redis.call('LSET', KEYS[1], at, ARGV[3])
return 1
