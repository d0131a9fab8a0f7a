# frozen_string_literal: true

# Measures the installed gem, each figure beside what it is compared with, on the embedded store or
# another one:
#
#   ruby bindings/ruby/bench.rb [URL]

require "nblock"
require "timeout"
require "tmpdir"

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC)
end

# The best of several rounds, in microseconds: what disturbs a round only makes it slower.
def microseconds
  Array.new(5) do
    count = 0
    start = now
    while now - start < 0.3
      20.times { yield }
      count += 20
    end
    (now - start) / count * 1e6
  end.min
end

def show(what, figure, unit = "µs")
  puts format("%-58s %9.2f %s", what, figure, unit)
end

def median(times)
  times.sort[times.size / 2]
end

Dir.mktmpdir do |directory|
  NBLock.configure { |c| c.url = ARGV.fetch(0, "embedded:#{directory}") }
  lock = NBLock::Lock.new("bench")
  lock.synchronize {}

  show "Lock#synchronize, free lock", microseconds { lock.synchronize {} }
  show "Lock#lock and #unlock, free lock", microseconds { lock.lock || lock.unlock }
  show "Lock.new and #synchronize", microseconds { NBLock::Lock.new("bench").synchronize {} }
  mutex = Mutex.new
  show "Ruby's own Mutex#synchronize (one process only)", microseconds { mutex.synchronize {} }
  File.open(File.join(directory, "flock"), File::CREAT | File::RDWR) do |file|
    show "File#flock and unlock, file kept open (no lease, no timeout)",
         microseconds { file.flock(File::LOCK_EX) && file.flock(File::LOCK_UN) }
  end
  path = File.join(directory, "flock")
  show "File.open, flock, close", microseconds { File.open(path, "r+") { |file| file.flock(File::LOCK_EX) } }

  # Hand-over between processes: the child waits for each of our releases, and tells when it was granted.
  ready, child_ready = IO.pipe
  granted, child_granted = IO.pipe
  go, parent_go = IO.pipe
  pid = fork do
    other = NBLock::Lock.new("bench", timeout: 60)
    while go.read(1) == "g"
      child_ready.write("r")
      other.lock
      child_granted.write([now].pack("d"))
      other.unlock
    end
    exit!(0)
  end
  times = Array.new(300) do
    lock.lock(timeout: 60)
    parent_go.write("g")
    ready.read(1)
    # Long enough for the other process to have come to its wait.
    sleep 0.002
    released = now
    lock.unlock
    (granted.read(8).unpack1("d") - released) * 1e6
  end
  parent_go.write("x")
  Process.wait(pid)
  show "release in one process to grant in another, median", median(times)

  # Threads of one process.
  times = Array.new(300) do
    lock.lock(timeout: 60)
    waiter = Thread.new { NBLock::Lock.new("bench", timeout: 60).synchronize { now } }
    Thread.pass until waiter.stop?
    released = now
    lock.unlock
    (waiter.value - released) * 1e6
  end
  show "release in one thread to grant in another, median", median(times)

  # How soon Timeout gets through a wait.
  lock.lock
  times = Array.new(50) do
    start = now
    begin
      Timeout.timeout(0.02) { NBLock::Lock.new("bench").lock(timeout: 60) }
    rescue Timeout::Error
      (now - start - 0.02) * 1e6
    end
  end
  show "Timeout's moment to its exception, median", median(times)
end
