-- Skip a delivery that must not run, so that RQ neither runs nor retries it.
--
-- KEYS: 1 job hash  2 intermediate list  3 its first_seen key  4 wip zset  5 finished  6 failed zset
-- ARGV: 1 id  2 token in hex  3 status to put right, or '' to touch nothing of the live run
--       4 seconds to keep a job that names no result_ttl  5 the same of a failure_ttl
redis.call('LREM', KEYS[2], 1, ARGV[1])
redis.call('DEL', KEYS[3])
if ARGV[3] == '' then return 'held' end

local failed = ARGV[3] == 'failed'
local hash = redis.call('HMGET', KEYS[1], 'jg', failed and 'failure_ttl' or 'result_ttl', 'data')
local ours = hash[1] == ARGV[2] or hash[1] == ARGV[2] .. '!'
if not hash[3] or not ours then return 'newer' end

local ttl = tonumber(hash[2] or '') or tonumber(ARGV[failed and 5 or 4])
local now = tonumber(redis.call('TIME')[1])
redis.call('HSET', KEYS[1], 'status', ARGV[3], 'jg', ARGV[2] .. '!')
if ttl < 0 then
  redis.call('PERSIST', KEYS[1])
else
  redis.call('EXPIRE', KEYS[1], math.max(ttl, 1))
end
-- RQ forgets a job with its registry's entry: score is when, and it deletes what it finds there.
local score = ttl < 0 and '+inf' or now + math.max(ttl, 1)
if ARGV[3] == 'finished' then redis.call('ZADD', KEYS[5], score, ARGV[1]) end
if failed then redis.call('ZADD', KEYS[6], score, ARGV[1]) end
return ARGV[3]
