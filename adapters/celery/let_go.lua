-- Say of messages that a worker had taken by a connection that is gone that nobody holds them.
-- KEYS: 1 unacked hash  2 its index
-- ARGV: 1 the worker's session in hex  2 what stands there instead
--       3 since when it takes by another connection (seconds)  4... tags
-- A tag is the message's own: it may be in a list again, or have been taken anew, by whomever.
for at = 4, #ARGV do
  local taken_at = redis.call('ZSCORE', KEYS[2], ARGV[at])
  if taken_at and tonumber(taken_at) < tonumber(ARGV[3]) then
    local raw = redis.call('HGET', KEYS[1], ARGV[at]) or ''
    local header = '("jobguard%-worker": ?")' .. ARGV[1] .. '"'
    local changed, times = string.gsub(raw, header, '%1' .. ARGV[2] .. '"')
    if times == 1 then redis.call('HSET', KEYS[1], ARGV[at], changed) end
  end
end
return #ARGV - 3
