-- Delete entries that Postgres has.
--
-- KEYS: 1 stream  2 its size in bytes  3 hash of notes about deliveries
-- ARGV: 1 bytes that an entry takes beside its content; then the ids of the entries
-- Returns how many were there.
local deleted, freed = 0, 0
for i = 2, #ARGV do
  local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  if found then
    redis.call('XDEL', KEYS[1], ARGV[i])
    deleted, freed = deleted + 1, freed + #found[2][2] + tonumber(ARGV[1])
    for n = 4, #found[2], 2 do redis.call('HDEL', KEYS[3], found[2][n]) end
  end
end
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
elseif freed > 0 then
  redis.call('DECRBY', KEYS[2], freed)
end
return deleted
