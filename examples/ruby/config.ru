# frozen_string_literal: true

# A web application that rebuilds its index for one request at a time, on all servers that use one store. Works under
# preforking servers. Each request makes a lock object of its own, because an object is one holder.
#
#   puma --workers 4 --preload config.ru

require "nblock"

def rebuild_index
  sleep 0.1
end

run(lambda do |_env|
  NBLock::Lock.new("examples:index").synchronize(timeout: 1) { rebuild_index }
  [200, { "content-type" => "text/plain" }, ["rebuilt\n"]]
rescue NBLock::Error::LockUnavailable
  [503, { "content-type" => "text/plain", "retry-after" => "1" }, ["somebody else is rebuilding it\n"]]
end)
