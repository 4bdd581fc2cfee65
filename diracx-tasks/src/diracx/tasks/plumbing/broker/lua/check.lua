-- Checks which commands the caller may send, and that scripts may use keys that they do not declare. Changes nothing.
-- KEYS: none. ARGV: commands with their arguments, separated by spaces.
-- Returns the commands that the caller may not send, or that the server does not have.
-- #flags no-writes
local refused = {}
for _, command in ipairs(redis.acl_check_cmd and ARGV or {}) do
  local words = {}
  for word in string.gmatch(command, '%S+') do words[#words + 1] = word end
  local known, allowed = pcall(redis.acl_check_cmd, unpack(words))
  if not (known and allowed) then refused[#refused + 1] = command end
end
if #refused == 0 or refused[1] ~= ARGV[1] then
  redis.call('EXISTS', '$DELAYED')
  redis.call('EXISTS', '$DELAYED_DATA')  -- in a cluster, of another slot
end
return refused
