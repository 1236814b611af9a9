-- Say of each delivery where Redis has it, but for the lists, which are read once and not per id.
--
-- ARGV: 1 key base  2 job prefix, then of each delivery: id, queue
-- Returns of each: {jg, status, enqueued_at, place}. place: 'missing' (no data), 'running' (a live
-- execution), 'placed' (in the zset that its status names), '' (else). What is placed and waits for
-- jobs none of which is surely to end here any more has three members more: those of them that Redis
-- does not know; whether one that failed will do; and the tokens of those that Redis shows as running
-- or failed, of which the ledger may know better.
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
  if status == 'finished' then -- RQ before 2.7 says so of what waits for its next repeat
    zset = base .. ':scheduled:' .. queue
  elseif status == 'scheduled' or status == 'deferred' then
    zset = base .. ':' .. status .. ':' .. queue
  elseif status == 'ready_to_enqueue' then
    zset = base .. ':ready:' .. queue
  elseif status == 'rate_limited' then
    zset = base .. ':rl:' .. (redis.call('HGET', key, 'rate_limit_key') or '') .. ':rate_limited'
  end
  return zset and redis.call('ZSCORE', zset, id) and 'placed' or ''
end

-- The parents that Redis has forgotten, and the tokens of the doubtful ones; nil if one of the others
-- has still to end, or ended in vain.
local function forgotten(key, any_end)
  local lost, doubtful = {}, {}
  local listed = redis.call('HGET', key, 'dependency_ids')
  local ok, parents = pcall(cjson.decode, listed or '[]')
  if not ok or type(parents) ~= 'table' then return nil end
  for _, parent in ipairs(parents) do
    local hash = redis.call('HMGET', jobs .. parent, 'status', 'jg')
    local status, token = hash[1], hash[2]
    if redis.call('HSTRLEN', jobs .. parent, 'data') == 0 then
      lost[#lost + 1] = parent
    elseif status ~= 'finished' and not (status == 'failed' and any_end) then
      if not token or (status ~= 'started' and status ~= 'failed') then return nil end
      doubtful[#doubtful + 1] = string.sub(token, 1, 32)
    end
  end
  return lost, doubtful
end

for i = 3, #ARGV, 2 do
  local key = jobs .. ARGV[i]
  local hash = redis.call('HMGET', key, 'jg', 'status', 'enqueued_at')
  local status = hash[2] or ''
  local answer = { hash[1] or '', status, hash[3] or '', place(ARGV[i], ARGV[i + 1], key, status) }
  if status == 'deferred' and answer[4] == 'placed' then
    local any_end = redis.call('HGET', key, 'allow_dependency_failures') == '1'
    local lost, doubtful = forgotten(key, any_end)
    if lost then answer[5], answer[6], answer[7] = lost, any_end and 1 or 0, doubtful end
  end
  answers[#answers + 1] = answer
end
return answers
