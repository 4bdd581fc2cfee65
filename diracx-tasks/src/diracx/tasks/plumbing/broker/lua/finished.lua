-- Deletes entries of a stream that were acknowledged and not deleted, as version 0.7 leaves them.
-- KEYS: the stream. ARGV: first entry, limit of entries, limit of bytes (one larger message is allowed).
-- Returns the next entry to examine, '' after all delivered ones; and how many were deleted.
-- #flags allow-oom
local first, bytes_left, deleted, upto = ARGV[1], tonumber(ARGV[3]), 0, nil
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
for _, group in ipairs(groups.err and {} or groups) do
  local fields = {}
  for at = 1, #group, 2 do fields[group[at]] = group[at + 1] end
  if fields.name == '$GROUP' then upto = fields['last-delivered-id'] end
end
if not upto then return {'', 0} end
for _ = 1, tonumber(ARGV[2]) do
  local entry = bytes_left > 0 and redis.call('XRANGE', KEYS[1], first, upto, 'COUNT', 1)[1]
  if not entry then return {bytes_left > 0 and '' or first, deleted} end
  if not redis.call('XPENDING', KEYS[1], '$GROUP', entry[1], entry[1], 1)[1] then
    deleted = deleted + redis.call('XDEL', KEYS[1], entry[1])
  end
  bytes_left = bytes_left - #(entry[2][2] or '')
  if entry[1] == upto then return {'', deleted} end
  first = '(' .. entry[1]
end
return {first, deleted}
