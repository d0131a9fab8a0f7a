# frozen_string_literal: true

# One worker at a time: start several of them. The one that has the lock works in small steps, and stops as soon
# as it cannot rely on the lock any more; the next one takes over a millisecond later.
#
#   ruby worker.rb [STEPS]

require "nblock"

steps = Integer(ARGV.fetch(0, "20"))
lock = NBLock::Lock.new("examples:worker", timeout: Float::INFINITY)
lock.on_lost { |lost| warn "lost #{lost.key}, stopping" }

begin
  lock.synchronize do
    puts "working, with fence #{lock.fence}"
    steps.times do |step|
      break if lock.lost?

      puts "step #{step + 1}"
      sleep 0.01
    end
  end
  puts "done"
rescue NBLock::Error::LostLock => e
  # Somebody else may have worked at the same time: what was done last has to be looked at.
  abort e.message
rescue Interrupt
  # Nothing is left to do: the lock was given back on the way here.
  puts "interrupted"
end
