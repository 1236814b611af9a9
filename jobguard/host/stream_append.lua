-- Add entries to the stream, all of them or none.
--
-- KEYS: 1 stream  2 its size in bytes  3 hash of notes about deliveries
--       4 mark that Postgres is away for this host  5 hash of the sources that have a stream
--       6 how many entries this process has added
-- ARGV: 1 bound in bytes  2 milliseconds for which the mark stays  3 bytes that an entry takes beside
--       its content  4 id of the source  5 its description  6 milliseconds for which the count stays;
--       then of each entry: content, shorter content past the bound ('' none), number of its notes,
--       field and text of each note
-- Returns the ids of the entries and the count; nothing if there is no room.
local used = redis.call('XLEN', KEYS[1]) > 0 and tonumber(redis.call('GET', KEYS[2]) or '0') or 0
local bound, more, entries, i = tonumber(ARGV[1]), 0, {}, 7
while i <= #ARGV do
  local content, notes = ARGV[i], tonumber(ARGV[i + 2])
  if ARGV[i + 1] ~= '' and used + more + #content > bound then content = ARGV[i + 1] end
  more = more + #content + tonumber(ARGV[3])
  local entry = {'c', content}
  for n = 1, notes do
    entry[2 * n + 1], entry[2 * n + 2] = 't', ARGV[i + 2 * n + 1]
  end
  entries[#entries + 1] = {entry, i, notes}
  i = i + 3 + 2 * notes
end
redis.call('SET', KEYS[4], '1', 'PX', ARGV[2])
redis.call('HSET', KEYS[5], ARGV[4], ARGV[5])
redis.call('EXPIRE', KEYS[5], 604800)
if used + more > 2 * bound then return {} end
local ids = {}
for n, found in ipairs(entries) do
  local entry, first, notes = unpack(found)
  ids[n] = redis.call('XADD', KEYS[1], '*', unpack(entry))
  for note = 1, notes do
    redis.call('HSET', KEYS[3], ARGV[first + 2 * note + 1], ARGV[first + 2 * note + 2])
  end
end
redis.call('SET', KEYS[2], used + more)
ids[#ids + 1] = redis.call('INCRBY', KEYS[6], #ids)
redis.call('PEXPIRE', KEYS[6], ARGV[6])
return ids
