-- Push one message, unless it is there: the client may send this twice, and a leader may have been first.
--
-- KEYS: 1 list  2 its messages
-- ARGV: 1 id  2 message
if redis.call('HSETNX', KEYS[2], ARGV[1], ARGV[2]) == 1 then redis.call('RPUSH', KEYS[1], ARGV[1]) end
