-- Entries that were delivered to a worker and are not settled.

local function is_pending(stream, consumer, entry, deliveries)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
  return not pending.err and pending[1] ~= nil and tonumber(pending[1][4]) == deliveries
end

-- Which of these entries of a stream are pending for this worker: entry -> deliveries.
-- One XPENDING for the range of all entries, as those of a batch are adjacent; one more for each entry not found. The
-- range consists of whole ms, for the ids of one ms (1-9, 1-10) are not in the order of their texts.
local function pending_of(consumer, stream, entries)
  local found, first, last = {}, entries[1], entries[1]
  for _, entry in ipairs(entries) do
    if entry < first then first = entry elseif entry > last then last = entry end
  end
  if #entries > 2 then
    first, last = string.match(first, '%d+'), string.match(last, '%d+')
    local pending = redis.pcall('XPENDING', stream, '$GROUP', first, last, 10000, consumer)
    for _, p in ipairs(pending.err and {} or pending) do found[p[1]] = tonumber(p[4]) end
  end
  for _, entry in ipairs(entries) do
    if not found[entry] then
      local p = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
      if not p.err and p[1] then found[entry] = tonumber(p[1][4]) end
    end
  end
  return found
end

-- The same for a flat list with `step` values per message, of which the first two are its stream and entry:
-- stream -> entry -> deliveries.
local function all_pending_of(consumer, list, step)
  local by_stream, found = {}, {}
  for at = 1, #list, step do
    local entries = by_stream[list[at]]
    if not entries then
      entries = {}
      by_stream[list[at]] = entries
    end
    entries[#entries + 1] = list[at + 1]
  end
  for stream, entries in pairs(by_stream) do found[stream] = pending_of(consumer, stream, entries) end
  return found
end

-- Field of a worker's held-locks record for an entry that it runs and that the server has lost: see renew.lua.
local function orphan(stream, entry)
  return 'entry:' .. stream .. ' ' .. entry
end

-- True if the entry is still reserved for this consumer with this delivery count. This fences late settlements.
local function owns(stream, consumer, entry, deliveries)
  return is_pending(stream, consumer, entry, deliveries)
    or redis.call('HEXISTS', '$HELD_PREFIX' .. consumer, orphan(stream, entry)) == 1
end

local function remove(stream, entry)
  redis.call('XACK', stream, '$GROUP', entry)
  redis.call('XDEL', stream, entry)
end
