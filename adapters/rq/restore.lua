-- Put one delivery back as it was, unless it is there, or another life of its job is.
--
-- KEYS: 1 job hash  2 queue list  3 intermediate list  4 queues set  5 wip zset  6 executions zset
-- ARGV: 1 deadline in Redis' time  2 id  3 token in hex  4 mode  5 at front  6 score
--       7 expires at (ms; '' never)  8 key base  9 job prefix  10 queue prefix  11 queue
--       12 group  13 rate key  14 rate concurrency  15 a failed parent will do
--       16 what is known: 'takeover' (its worker is dead), 'running' (a live worker has it: its hash
--          alone, for others to see), 'released' (its parents have ended), or ''
--       17 the id may stand in a list though its hash is gone
--       18 number of older tokens that may be replaced, then these
--       then number of parents, then these; then now, as RQ writes it;
--       then the fields and values of the hash
-- Returns restored, present, changed, expired or too_late.
local id, token, mode = ARGV[2], ARGV[3], ARGV[4]
local base, jobs, queue = ARGV[8], ARGV[9], ARGV[11]
local takeover, released = ARGV[16] == 'takeover', ARGV[16] == 'released'

local time = redis.call('TIME')
local now = tonumber(time[1])
if now + tonumber(time[2]) / 1e6 > tonumber(ARGV[1]) then return 'too_late' end

local at = 18
local function list()
  local n, values = tonumber(ARGV[at]), {}
  for i = 1, n do values[i] = ARGV[at + i] end
  at = at + n + 1
  return values
end
local replaces, parents = list(), list()
local written_now = ARGV[at]
at = at + 1

local function zset(status)
  if status == 'ready_to_enqueue' then status = 'ready' end
  if status == 'rate_limited' then return base .. ':rl:' .. ARGV[13] .. ':rate_limited' end
  return base .. ':' .. status .. ':' .. queue
end

local function is_running()
  return redis.call('ZCOUNT', KEYS[6], '(' .. now, '+inf') > 0
end

-- The executions of a run whose worker is dead: RQ itself believes in them for minutes.
local function forget_runs()
  for _, execution in ipairs(redis.call('ZRANGE', KEYS[6], 0, -1)) do
    redis.call('ZREM', KEYS[5], id .. ':' .. execution)
    redis.call('DEL', base .. ':execution:' .. id .. ':' .. execution)
  end
  redis.call('DEL', KEYS[6])
end

local function forget_places()
  redis.call('LREM', KEYS[2], 0, id)
  redis.call('LREM', KEYS[3], 0, id)
  for _, status in ipairs({ 'scheduled', 'deferred', 'ready_to_enqueue' }) do
    redis.call('ZREM', zset(status), id)
  end
end

local function expire(key)
  if ARGV[7] ~= '' then redis.call('PEXPIREAT', key, ARGV[7]) end
end

local function wait_for_slot()
  local rl = base .. ':rl:' .. ARGV[13]
  redis.call('HSET', KEYS[1], 'status', 'rate_limited')
  redis.call('SADD', base .. ':rl-keys', ARGV[13])
  redis.call('HSET', rl, 'concurrency', ARGV[14])
  redis.call('ZREM', rl .. ':allowed', id)
  redis.call('ZADD', rl .. ':rate_limited', ARGV[6] ~= '' and ARGV[6] or now, id)
  -- As RQ does after every push: fill the free slots, oldest first.
  while redis.call('ZCARD', rl .. ':allowed') < tonumber(ARGV[14]) do
    local first = redis.call('ZPOPMIN', rl .. ':rate_limited')[1]
    if not first then break end
    local hash = redis.call('HMGET', jobs .. first, 'origin', 'status', 'enqueue_at_front')
    if hash[1] and hash[2] == 'rate_limited' then
      redis.call('ZADD', rl .. ':allowed', now, first)
      redis.call(hash[3] == '1' and 'LPUSH' or 'RPUSH', ARGV[10] .. hash[1], first)
      redis.call('HSET', jobs .. first, 'status', 'queued', 'enqueued_at', written_now)
    end
  end
end

local function wait_in_line()
  redis.call('HSET', KEYS[1], 'status', 'queued')
  redis.call(ARGV[5] == '1' and 'LPUSH' or 'RPUSH', KEYS[2], id)
end

-- Parents that are in Redis are asked; one that is not is still to end, or its end is found elsewhere.
local function unmet()
  local waiting = {}
  for _, parent in ipairs(parents) do
    local status = redis.call('HGET', jobs .. parent, 'status')
    if status ~= 'finished' and not (status == 'failed' and ARGV[15] == '1') then
      waiting[#waiting + 1] = parent
    end
  end
  return waiting
end

-- As RQ moves on what waited: out of its parents' sets, which RQ watches when it does the same.
local function go_on()
  for _, parent in ipairs(parents) do redis.call('SREM', jobs .. parent .. ':dependents', id) end
  redis.call('ZREM', zset('deferred'), id)
  if ARGV[13] ~= '' then return wait_for_slot() end
  return wait_in_line()
end

local function put(status)
  redis.call('SADD', KEYS[4], ARGV[10] .. queue)
  if status == 'scheduled' then
    redis.call('HSET', KEYS[1], 'status', 'scheduled')
    redis.call('ZADD', zset('scheduled'), ARGV[6], id)
  elseif status == 'deferred' then
    local waiting = released and {} or unmet()
    if #waiting == 0 then return go_on() end
    local own = jobs .. ':' .. id .. ':dependencies'
    for _, parent in ipairs(waiting) do
      redis.call('SADD', jobs .. parent .. ':dependents', id)
      redis.call('SADD', own, parent)
    end
    redis.call('HSET', KEYS[1], 'status', 'deferred')
    redis.call('ZADD', zset('deferred'), ARGV[6], id)
    expire(own)
  elseif status == 'rate_limited' then
    wait_for_slot()
  else
    wait_in_line()
  end
end

local hash = redis.call('HMGET', KEYS[1], 'jg', 'status')
local jg, status = hash[1] or '', hash[2] or ''

if redis.call('HSTRLEN', KEYS[1], 'data') > 0 then
  if jg == token then
    if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then
      return 'present'
    end
    if ARGV[16] == 'running' then return 'present' end
    if takeover then forget_runs() elseif is_running() then return 'present' end
    if released and status == 'deferred' then
      go_on()
      return 'restored'
    end
    if status == 'queued' and redis.call('LPOS', KEYS[2], id) then return 'present' end
    if status ~= 'queued' and status ~= 'started' and redis.call('ZSCORE', zset(status), id) then
      return 'present'
    end
    -- Its hash is whole, but no worker would find it.
    redis.call('LREM', KEYS[3], 0, id)
    if status == 'started' then redis.call('PERSIST', KEYS[1]) end
    if status == 'queued' or status == 'started' then
      local allowed = base .. ':rl:' .. ARGV[13] .. ':allowed'
      local slot = ARGV[13] == '' or redis.call('ZSCORE', allowed, id)
      put(slot and 'queued' or 'rate_limited')
    elseif status == mode then
      put(mode)
    else
      put('queued')
    end
    return 'restored'
  end
  if jg == token .. '!' then
    -- RQ wrote its end; another status since then is a new life by unguarded hands.
    local ended = status == 'finished' or status == 'failed' or status == 'stopped'
    return (ended or status == 'canceled') and 'present' or 'changed'
  end
  local known = false
  for _, older in ipairs(replaces) do
    known = known or jg == older or jg == older .. '!'
  end
  if not known then return 'changed' end
  if takeover then forget_runs() elseif is_running() then return 'present' end
  forget_places()
elseif takeover then
  forget_runs()
elseif ARGV[16] ~= 'running' and is_running() then
  return 'present'
end

if ARGV[16] == 'running' then
  redis.call('DEL', KEYS[1])
  for i = at, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
  redis.call('HSET', KEYS[1], 'status', 'started')
  return 'restored'
end
if ARGV[7] ~= '' and tonumber(ARGV[7]) <= now * 1000 then return 'expired' end
if ARGV[17] == '1' or redis.call('LLEN', KEYS[2]) <= 256 then
  redis.call('LREM', KEYS[2], 0, id)
  redis.call('LREM', KEYS[3], 0, id)
end
redis.call('DEL', KEYS[1])
for i = at, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
-- A slot that it held is lost with the rest: it must take one again.
put(mode == 'queued' and ARGV[13] ~= '' and 'rate_limited' or mode)
if ARGV[12] ~= '' then
  redis.call('SADD', base .. ':group:' .. ARGV[12], id)
  redis.call('SADD', base .. ':groups', ARGV[12])
end
expire(KEYS[1])
return 'restored'
