# frozen_string_literal: true

# Runs a report once a day, in the first process that tries. There is no unlock: the lease keeps the others away until
# it has run out, also after this process has ended. With a network store, the processes of all machines share the
# lease. With the embedded store, each machine has its own, and a reboot ends it: then the report may run twice that
# day.
#
#   ruby once_a_day.rb

require "nblock"

if NBLock::Lock.new("examples:report").try_lock(expire: 86_400)
  puts "running the report"
else
  record = NBLock::Lock.find("examples:report").record
  puts "process #{record.pid} on #{record.host} has run it at #{record.acquired_at}"
end
