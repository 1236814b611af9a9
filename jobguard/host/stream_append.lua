-- Add entries to the stream, all of them or none.
--
-- KEYS: 1 stream  2 its size in bytes  3 hash of notes about deliveries
--       4 mark that Postgres is away for this host  5 hash of the sources that have a stream
-- ARGV: 1 bound in bytes  2 milliseconds for which the mark stays  3 bytes that an entry takes beside
--       its content  4 id of the source  5 its description; then of each entry: content, shorter
--       content past the bound ('' none), field of its note ('' none), the note
-- Returns the ids of the entries; nothing if there is no room.
local used = redis.call('XLEN', KEYS[1]) > 0 and tonumber(redis.call('GET', KEYS[2]) or '0') or 0
local bound, more, contents = tonumber(ARGV[1]), 0, {}
for i = 6, #ARGV, 4 do
  local content = ARGV[i]
  if ARGV[i + 1] ~= '' and used + more + #content > bound then content = ARGV[i + 1] end
  more = more + #content + tonumber(ARGV[3])
  contents[#contents + 1] = content
end
redis.call('SET', KEYS[4], '1', 'PX', ARGV[2])
redis.call('HSET', KEYS[5], ARGV[4], ARGV[5])
redis.call('EXPIRE', KEYS[5], 604800)
if used + more > 2 * bound then return {} end
local ids = {}
for n, content in ipairs(contents) do
  local field = ARGV[4 * n + 4]
  if field ~= '' then
    ids[n] = redis.call('XADD', KEYS[1], '*', 'c', content, 't', field)
    redis.call('HSET', KEYS[3], field, ARGV[4 * n + 5])
  else
    ids[n] = redis.call('XADD', KEYS[1], '*', 'c', content)
  end
end
redis.call('SET', KEYS[2], used + more)
return ids
