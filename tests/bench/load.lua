-- One wrk script for every workload; it prints one JSON line. Settings come from the environment:
--   TOKEN (none: no header), METHOD, BODY_LINE, LINES (the body is BODY_LINE, LINES times with a line feed; LINES 0: as it is), ACCEPT
--   TARGETS  file with one request target a line, sent in turn        KEYED  1: an idempotency key of its own for each request
--   PER_REQUEST  records a request stands for
-- A status other than 200 counts as failed; a figure with failures is meaningless.
local function env(name, default) return os.getenv(name) or default end

local method, line, lines = env("METHOD", "GET"), env("BODY_LINE", ""), tonumber(env("LINES", "0"))
local per_request, keyed = tonumber(env("PER_REQUEST", "1")), env("KEYED", "") ~= ""
local body = nil
if line ~= "" then body = lines == 0 and line or string.rep(line .. "\n", lines) end

if env("TOKEN", "dev") ~= "none" then wrk.headers["Authorization"] = "Bearer " .. env("TOKEN", "dev") end
if env("ACCEPT", "") ~= "" then wrk.headers["Accept"] = os.getenv("ACCEPT") end

local requests, targets, n, salt = {}, {}, 0, 0

function init()
  for target in io.lines(os.getenv("TARGETS")) do
    targets[#targets + 1] = target
    requests[#requests + 1] = wrk.format(method, target, nil, body)
  end
  salt = os.time()
end

function request()
  n = n + 1
  local at = (n - 1) % #requests + 1
  if not keyed then return requests[at] end
  return wrk.format(method, targets[at] .. "&idempotency_key=bench-" .. salt .. "-" .. n, nil, body)
end

function done(summary, latency)
  local seconds = summary.duration / 1e6
  local e = summary.errors
  io.write(string.format(
    '{"requests_per_s":%.0f,"records_per_s":%.0f,"p50_ms":%.3f,"p99_ms":%.3f,"max_ms":%.1f,"mb_per_s":%.1f,"failed":%d}\n',
    summary.requests / seconds, per_request * summary.requests / seconds, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    latency.max / 1000, summary.bytes / seconds / 1e6, e.connect + e.status + e.read + e.write + e.timeout))
end
