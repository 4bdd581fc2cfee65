-- What is in a worker's hands: entries of streams that were delivered to it and are not settled.

local function is_pending(stream, consumer, entry, deliveries)
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1, consumer)
  return not pending.err and pending[1] ~= nil and tonumber(pending[1][4]) == deliveries
end

-- Of some entries of a stream, what is pending with this worker: entry -> deliveries.
-- One question for all that lie side by side, as those of a batch do; one for each of the others.
local function pending_of(consumer, stream, entries)
  local found, first, last = {}, entries[1], entries[1]
  for _, entry in ipairs(entries) do
    if entry < first then first = entry elseif entry > last then last = entry end
  end
  if #entries > 2 then
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

-- The same of a list in which each message has `step` places, of which the first two are its stream and its entry:
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

-- The field in a worker's held-locks record for an entry that it runs and that the server has lost: see renew.lua.
local function orphan(stream, entry)
  return 'entry:' .. stream .. ' ' .. entry
end

-- Is the entry still ours, delivered as often as we believe? This fences off late settlements.
local function owns(stream, consumer, entry, deliveries)
  return is_pending(stream, consumer, entry, deliveries)
    or redis.call('HEXISTS', '$HELD_PREFIX' .. consumer, orphan(stream, entry)) == 1
end

local function remove(stream, entry)
  redis.call('XACK', stream, '$GROUP', entry)
  redis.call('XDEL', stream, entry)
end
