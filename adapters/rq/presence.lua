-- Say of each delivery where Redis has it, but for the lists, which are read once and not per id.
--
-- ARGV: 1 key base  2 job prefix, then of each delivery: id, queue
-- Returns of each: {jg, status, enqueued_at, place}. place: 'missing' (no data), 'running' (a live
-- execution), 'placed' (in the zset that its status names), '' (else).
local base, jobs = ARGV[1], ARGV[2]
local now = redis.call('TIME')[1]
local answers = {}

local function place(id, queue, key, status)
  if redis.call('HSTRLEN', key, 'data') == 0 then return 'missing' end
  if status == 'started' or status == 'queued' then
    local live = redis.call('ZCOUNT', base .. ':executions:' .. id, '(' .. now, '+inf')
    return live > 0 and 'running' or ''
  end
  local zset
  if status == 'scheduled' or status == 'deferred' then
    zset = base .. ':' .. status .. ':' .. queue
  elseif status == 'ready_to_enqueue' then
    zset = base .. ':ready:' .. queue
  elseif status == 'rate_limited' then
    zset = base .. ':rl:' .. (redis.call('HGET', key, 'rate_limit_key') or '') .. ':rate_limited'
  end
  return zset and redis.call('ZSCORE', zset, id) and 'placed' or ''
end

for i = 3, #ARGV, 2 do
  local key = jobs .. ARGV[i]
  local hash = redis.call('HMGET', key, 'jg', 'status', 'enqueued_at')
  local status = hash[2] or ''
  answers[#answers + 1] =
    { hash[1] or '', status, hash[3] or '', place(ARGV[i], ARGV[i + 1], key, status) }
end
return answers
