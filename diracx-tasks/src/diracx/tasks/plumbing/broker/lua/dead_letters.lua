-- Reads dead letters to import into the database, for one worker at a time: all workers poll for them.
-- KEYS: none. ARGV: worker, lease of the import against other workers (ms), first entry as for XRANGE, limit of
-- entries, limit of bytes (one larger entry is allowed).
-- Returns entries like XRANGE; an empty list if there are none, or another worker imports them.
-- #flags allow-oom
if redis.call('EXISTS', '$DEAD_LETTERS', '$IMPORTER') == 0 then return {} end
local importer = redis.call('GET', '$IMPORTER')
if importer and importer ~= ARGV[1] then return {} end
local first, found, bytes = ARGV[3], {}, 0
while #found < tonumber(ARGV[4]) do
  local entry = redis.call('XRANGE', '$DEAD_LETTERS', first, '+', 'COUNT', 1)[1]
  if not entry then break end
  for _, part in ipairs(entry[2]) do bytes = bytes + #part end
  if found[1] and bytes > tonumber(ARGV[5]) then break end
  found[#found + 1] = entry
  first = '(' .. entry[1]
end
if found[1] then
  redis.call('SET', '$IMPORTER', ARGV[1], 'PX', ARGV[2])
else
  if importer then redis.call('DEL', '$IMPORTER') end
  if redis.call('XLEN', '$DEAD_LETTERS') == 0 then redis.call('DEL', '$DEAD_LETTERS') end
end
return found
