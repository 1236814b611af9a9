-- Delete the hash of a run that a restore had put back for others to see, and that ended unseen.
--
-- KEYS: 1 job hash
-- ARGV: 1 token in hex
-- Returns 1 if it was still there: a worker's own last word, or another life, is left alone.
local hash = redis.call('HMGET', KEYS[1], 'jg', 'status')
if hash[1] ~= ARGV[1] or hash[2] ~= 'started' then return 0 end
return redis.call('DEL', KEYS[1])
