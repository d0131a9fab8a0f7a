# frozen_string_literal: true

# Runs a report once a day, on whichever machine or process comes first. There is no unlock: the lease
# keeps the others away until it has run out, also after this process has ended. With the embedded store, a reboot
# forgets the lease, and the report may run twice that day. A network store remembers it.
#
#   ruby once_a_day.rb

require "nblock"

if NBLock::Lock.new("examples:report").try_lock(expire: 86_400)
  puts "running the report"
else
  record = NBLock::Lock.find("examples:report").record
  puts "process #{record.pid} on #{record.host} has run it at #{record.acquired_at}"
end
