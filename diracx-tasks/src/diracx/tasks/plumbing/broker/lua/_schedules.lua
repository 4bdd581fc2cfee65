-- Stored data of schedules. `$LAST_RUNS` is a hash: schedule -> "{stream} {entry} {task} {due}" of the last submitted
-- occurrence.

-- State of that occurrence: 'waits' (in its stream, or delayed), 'runs', or nil when it has ended.
local function state_of(last)
  local stream, entry, task = string.match(last or '', '^(%S+) (%S+) (%S+)')
  if not stream then return nil end
  if redis.call('HEXISTS', '$DELAYED_DATA', task) == 1 then return 'waits' end
  local found = redis.pcall('XRANGE', stream, entry, entry)
  if found.err or #found == 0 then return nil end
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
  return (pending.err or #pending == 0) and 'waits' or 'runs'
end

local function last_run(stream, entry, task, due)
  return stream .. ' ' .. entry .. ' ' .. task .. ' ' .. int(due)
end

-- Stores the outcome of an occurrence, unless its schedule was deleted. `outcome` is {id, text}.
local function note_outcome(outcome)
  if redis.call('HEXISTS', '$LAST_RUNS', outcome.id) == 1 then
    redis.call('HSET', '$OUTCOMES', outcome.id, int(math.floor(now_us() / 1000)) .. ' ' .. outcome.text)
  end
end
