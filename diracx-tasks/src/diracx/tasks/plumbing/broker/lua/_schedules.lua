-- What is known of schedules. `$LAST_RUNS` is a hash: schedule -> "{stream} {entry} {task} {due}" of the last
-- occurrence that was submitted.

-- Does that occurrence still wait, in its stream or put aside?
local function still_waits(last)
  if not last then return false end
  local stream, entry, task = string.match(last, '^(%S+) (%S+) (%S+)')
  if not stream then return false end
  if redis.call('HEXISTS', '$DELAYED_DATA', task) == 1 then return true end
  local found = redis.pcall('XRANGE', stream, entry, entry)
  if found.err or #found == 0 then return false end
  local pending = redis.pcall('XPENDING', stream, '$GROUP', entry, entry, 1)
  return pending.err ~= nil or #pending == 0
end

local function last_run(stream, entry, task, due)
  return stream .. ' ' .. entry .. ' ' .. task .. ' ' .. int(due)
end

-- How an occurrence ended, unless its schedule is forgotten. `outcome` is {id, text}.
local function note_outcome(outcome)
  if redis.call('HEXISTS', '$LAST_RUNS', outcome.id) == 1 then
    redis.call('HSET', '$OUTCOMES', outcome.id, int(math.floor(now_us() / 1000)) .. ' ' .. outcome.text)
  end
end
