# frozen_string_literal: true

require "io/wait"

# As small a scheduler of fibers as Ruby takes: it waits for descriptors and for time.
class Scheduler
  def initialize
    @readable = {}
    @sleeping = {}
    @ready = []
    @lock = Mutex.new
    @wake_reader, @wake_writer = IO.pipe
  end

  def fiber(&block)
    Fiber.new(blocking: false, &block).tap(&:resume)
  end

  def io_wait(io, events, timeout)
    raise NotImplementedError, "only reading without a limit is waited for" if events != IO::READABLE || timeout

    @readable[io] = Fiber.current
    Fiber.yield
    IO::READABLE
  ensure
    @readable.delete(io)
  end

  def kernel_sleep(duration = nil)
    block(:sleep, duration)
  end

  def block(_blocker, timeout = nil)
    @sleeping[Fiber.current] = timeout && now + timeout
    Fiber.yield
  ensure
    @sleeping.delete(Fiber.current)
  end

  # From any thread.
  def unblock(_blocker, fiber)
    @lock.synchronize { @ready << fiber }
    @wake_writer.write_nonblock(".", exception: false)
  end

  def close
    run_once until @readable.empty? && @sleeping.empty? && @ready.empty?
    @wake_reader.close
    @wake_writer.close
  end

  private

  def now
    Process.clock_gettime(Process::CLOCK_MONOTONIC)
  end

  def run_once
    limit = @sleeping.values.compact.min
    found, = IO.select([@wake_reader, *@readable.keys], nil, nil, limit && [limit - now, 0].max)
    @wake_reader.read_nonblock(100, exception: false) if found&.delete(@wake_reader)
    fibers = @lock.synchronize { @ready.slice!(0..) } + (found || []).map { |io| @readable[io] }
    fibers += @sleeping.select { |_, at| at && at <= now }.keys
    fibers.compact.uniq.each { |fiber| fiber.resume if fiber.alive? }
  end
end
