-- Reads truncated messages, for lists, so that little is sent of a large message.
-- KEYS: none. ARGV: limit of bytes of each value, ranges of streams (msgpack list of {stream, first, last, count}),
--   delayed tasks (msgpack list), limit of bytes to read (one larger message is allowed).
-- Returns {for each range the list of its entries {entry, {field, value, …}, bytes of its longest value},
--   for each task false or {value, bytes}, 1 if more is left to read: the end of the last range in the reply and the
--   ranges after it, or the tasks after the last}.
-- #flags no-writes
local at_most, ranges, delayed, bytes_left = tonumber(ARGV[1]), {}, {}, tonumber(ARGV[4])
for position, range in ipairs(cmsgpack.unpack(ARGV[2])) do
  if bytes_left <= 0 then return {ranges, delayed, 1} end
  local found, first = {}, range[2]
  ranges[position] = found
  -- One by one, to save memory: a page of large messages is not read as a whole.
  while #found < range[4] do
    if bytes_left <= 0 then return {ranges, delayed, 1} end
    local entries = redis.pcall('XRANGE', range[1], first, range[3], 'COUNT', 1)
    local entry = not entries.err and entries[1] -- an error after the greatest possible id
    if not entry then break end
    local fields, bytes = entry[2], 0
    for field = 2, #fields, 2 do
      bytes, bytes_left = math.max(bytes, #fields[field]), bytes_left - #fields[field]
      fields[field] = string.sub(fields[field], 1, at_most)
    end
    found[#found + 1] = {entry[1], fields, bytes}
    first = '(' .. entry[1]
  end
end
for position, task in ipairs(cmsgpack.unpack(ARGV[3])) do
  if bytes_left <= 0 then return {ranges, delayed, 1} end
  local stored = redis.call('HGET', '$DELAYED_DATA', task)
  bytes_left = bytes_left - #(stored or '')
  delayed[position] = stored and {string.sub(stored, 1, at_most), #stored}
end
return {ranges, delayed, 0}
