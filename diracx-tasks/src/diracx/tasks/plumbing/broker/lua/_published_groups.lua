-- Groups of the published package 0.7, for child_done() in _groups.lua: see published.py.

-- Records the end of a child of a group of 0.7, which has no hash: it has a counter of the children that have not
-- succeeded, a key for each that has, and the callback, which goes to the same queue as in 0.7. A failed child changes
-- nothing.
local function published_child_done(g)
  local key = '$GROUPS_PREFIX' .. g.id
  local remaining = redis.pcall('GET', key .. ':remaining')
  local left = tonumber(type(remaining) == 'string' and remaining or nil)
  if not left or not g.child or g.error then return end
  if not redis.call('SET', key .. ':results:' .. g.child, '\192', 'NX', 'EX', 86400) then return end
  redis.call('SET', key .. ':remaining', int(left - 1), 'KEEPTTL')
  local stored = left <= 1 and redis.call('GET', key .. ':callback')
  if not stored then return end
  redis.call('UNLINK', key .. ':callback', key .. ':remaining')
  local read, at, _, name = pcall(cmsgpack.unpack_limit, stored, 2, 1)
  local pack = cmsgpack.pack
  local message = read and '\134' .. table.concat({
    pack('task_id'), pack(string.sub(redis.sha1hex(key), 1, 32)), pack('task_name'), pack(name),
    pack('labels'), pack({callback_group_id = g.id}), pack('task_args'), string.sub(stored, at + 6),
    pack('task_kwargs'), '\128', pack('trace_context'), '\128'})
  if not (read and string.sub(stored, at + 1, at + 5) == '\164args' and pcall(enqueue, 'diracx:tasks:normal:medium', message)) then
    to_dead_letters(g.id, stored)
  end
end
