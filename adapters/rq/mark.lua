-- Give a waiting job a token, unless it was pushed again or has moved on since it was read.
--
-- KEYS: 1 hash of the job
-- ARGV: 1 the token that it had ('' none)  2 its status  3 the new token
-- Returns 1 if it has the new token.
local hash = redis.call('HMGET', KEYS[1], 'jg', 'status')
if (hash[1] or '') ~= ARGV[1] or hash[2] ~= ARGV[2] then return 0 end
if redis.call('HSTRLEN', KEYS[1], 'data') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'jg', ARGV[3])
return 1
