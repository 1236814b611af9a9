-- Tell of each delivery in which hash its message is.
--
-- ARGV: 1 prefix of all keys; then pairs of id and queue
-- Returns a character each: 0 none, 1 its queue, 2 the delay queue, 3 the dead letters.
local prefix, found = ARGV[1], {}
for i = 2, #ARGV, 2 do
  local rid, queue = ARGV[i], prefix .. ARGV[i + 1]
  local at = '0'
  if redis.call('HEXISTS', queue .. '.msgs', rid) == 1 then at = '1'
  elseif redis.call('HEXISTS', queue .. '.DQ.msgs', rid) == 1 then at = '2'
  elseif redis.call('HEXISTS', queue .. '.XQ.msgs', rid) == 1 then at = '3' end
  found[#found + 1] = at
end
return table.concat(found)
