# frozen_string_literal: true

# One worker at a time: start several of them. The one that has the lock works in small steps, and stops as soon as it
# cannot rely on the lock any more. The next one is woken when the lock is released.
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
  # Another worker may have worked at the same time: check what was done last.
  abort e.message
rescue Interrupt
  # Nothing is left to do: synchronize has released the lock.
  puts "interrupted"
end
