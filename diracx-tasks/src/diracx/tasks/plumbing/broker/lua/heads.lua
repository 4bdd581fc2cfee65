-- The beginning of stored messages, for lists: however large a message is, little of it is sent.
-- KEYS: none. ARGV: the most bytes of each, ranges of streams (msgpack list of {stream, first, last, count}),
--   delayed tasks (msgpack list).
-- Returns {for each range the list of its entries {entry, {field, value, …}, bytes of its longest value},
--   for each task false or {value, bytes}}. Values are cut off after the most bytes.
-- #flags no-writes
local at_most, ranges, delayed = tonumber(ARGV[1]), {}, {}
for position, range in ipairs(cmsgpack.unpack(ARGV[2])) do
  local found, first = {}, range[2]
  -- One by one: a page of large messages at once would take the memory that it is to save.
  while #found < range[4] do
    local entries = redis.pcall('XRANGE', range[1], first, range[3], 'COUNT', 1)
    local entry = not entries.err and entries[1] -- nothing comes after the last of all ids
    if not entry then break end
    local fields, bytes = entry[2], 0
    for field = 2, #fields, 2 do
      bytes = math.max(bytes, #fields[field])
      fields[field] = string.sub(fields[field], 1, at_most)
    end
    found[#found + 1] = {entry[1], fields, bytes}
    first = '(' .. entry[1]
  end
  ranges[position] = found
end
for position, task in ipairs(cmsgpack.unpack(ARGV[3])) do
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  delayed[position] = stored and {string.sub(stored, 1, at_most), #stored}
end
return {ranges, delayed}
