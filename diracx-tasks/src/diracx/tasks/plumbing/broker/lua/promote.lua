-- Move what is due from the delayed set into its streams, and the children of complete groups into theirs.
-- Messages are not decoded.
-- KEYS: none. ARGV: the most to move in one step (keeps the server free for others).
-- Returns {number moved, when the next is due in ms or -1, now in ms}.
-- #flags allow-oom
-- #include _time _queue _groups
local now, at_most = now_us() / 1000, tonumber(ARGV[1])
local due = redis.call('ZRANGEBYSCORE', '$DELAYED', '-inf', string.format('%.3f', now), 'LIMIT', 0, at_most)
for _, task in ipairs(due) do undelay(task) end
local moved = #due + release_staged(at_most - #due)
local next_due = redis.call('ZRANGE', '$DELAYED', 0, 0, 'WITHSCORES')[2]
return {moved, next_due and int(math.ceil(tonumber(next_due))) or '-1', int(math.floor(now))}
