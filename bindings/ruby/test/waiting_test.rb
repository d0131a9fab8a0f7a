# frozen_string_literal: true

require_relative "scheduler"

# Waiting: who runs meanwhile, and what ends it early without leaving anything behind.
class WaitingTest < StoreTest
  def setup
    super
    @key = fresh_key
    @holder = NBLock::Lock.new(@key)
    @waiter = NBLock::Lock.new(@key, expire: 3600, timeout: 600)
  end

  def test_that_other_threads_run_and_a_release_wakes_the_waiter
    @holder.lock
    ticks = 0
    ticker = Thread.new { loop { ticks += 1 and sleep 0.001 } }
    waiter = waiting_thread { @waiter.synchronize { :done } }
    before = ticks
    eventually("another thread's run") { ticks > before + 10 }
    assert_predicate waiter, :alive?
    @holder.unlock
    assert_equal :done, waiter.value
  ensure
    ticker&.kill
  end

  def test_that_waiting_threads_are_served_in_order
    @holder.lock
    order = Queue.new
    waiters = Array.new(5) do |index|
      waiting_thread { NBLock::Lock.new(@key, timeout: 600).synchronize { order << index } }
    end
    @holder.unlock
    waiters.each(&:join)
    assert_equal [0, 1, 2, 3, 4], Array.new(5) { order.pop }
  end

  def test_that_other_fibers_run
    @holder.lock
    events = []
    Thread.new do
      Fiber.set_scheduler(Scheduler.new)
      Fiber.schedule do
        events << :waits
        @waiter.lock
        events << :granted
        @waiter.unlock
      end
      Fiber.schedule do
        sleep 0.02
        events << :runs_meanwhile
        @holder.unlock
      end
    end.join
    assert_equal %i[waits runs_meanwhile granted], events
    assert_nothing_left @key
  end

  def test_that_timeout_interrupts
    @holder.lock
    %i[lock synchronize].each do |call|
      assert_raises(Timeout::Error) { Timeout.timeout(0.02) { @waiter.public_send(call) { flunk } } }
    end
    refute @waiter.held?
    @holder.unlock
    assert_nothing_left @key
  end

  def test_that_raising_and_killing_interrupt
    @holder.lock
    raised = waiting_thread { @waiter.lock }
    raised.raise(IOError, "stop")
    assert_equal "stop", assert_raises(IOError) { raised.value }.message
    killed = waiting_thread { @waiter.synchronize { flunk } }
    killed.kill
    assert killed.join(PATIENCE)
    refute @waiter.held?
    @holder.unlock
    assert_nothing_left @key
    # The object is as good as before.
    assert_nil(@waiter.synchronize {})
  end

  def test_that_an_interruption_gives_way_to_the_next_waiter
    @holder.lock
    first = waiting_thread { @waiter.lock }
    second = waiting_thread { NBLock::Lock.new(@key, timeout: 600).synchronize { :granted } }
    first.kill
    @holder.unlock
    assert_equal :granted, second.value
  end

  def test_that_the_callers_own_masks_hold
    @holder.lock
    thread = Thread.new do
      Thread.current.report_on_exception = false
      Thread.handle_interrupt(IOError => :never) do
        @waiter.lock
        @waiter.unlock
        :undisturbed
      end
    rescue IOError
      :later
    end
    eventually("the thread's wait") { thread.stop? }
    thread.raise(IOError)
    assert_nil thread.join(0.05)
    @holder.unlock
    assert_equal :later, thread.value
    assert_nothing_left @key
  end

  Interruption = Class.new(StandardError)

  # Runs the block, and interrupts it at the nth of the moments at which Ruby lets an interruption in:
  # whenever a method or block returns. Answers whether it came so far, and where it was then.
  #
  # how: as another thread's Thread#raise does, which can be held back; or as a signal handler does, which
  # cannot.
  def interrupt_at(nth, how, on_wait)
    count = 0
    place = nil
    me = Thread.current
    trace = TracePoint.new(:c_call, :c_return, :return, :b_return) do |point|
      next unless Thread.current == me
      next (on_wait&.call if point.method_id == :wait_readable) if point.event == :c_call

      count += 1
      next unless count == nth

      place = [how, point.event, point.method_id]
      how == :thread ? Thread.current.raise(Interruption) : raise(Interruption)
    end
    # The moments of other objects' finalizers are not this call's.
    GC.disable
    trace.enable
    yield
    place
  rescue Interruption
    place
  ensure
    trace.disable
    GC.enable
  end

  # Every moment of a call is tried, without and with somebody who holds the lock. A hold that was left
  # behind would last an hour.
  def each_moment(how, contended, lock_class = NBLock::Lock)
    (1..).each do |nth|
      holder = NBLock::Lock.new(@key)
      holder.lock if contended
      lock = lock_class.new(@key, expire: 3600, timeout: 600)
      place = interrupt_at(nth, how, contended ? -> { holder.unlock if holder.held? } : nil) { yield lock }
      holder.unlock if holder.held?
      return assert_operator(nth, :>, 20) if place.nil?

      # What was granted, but not yet heard of, is given back in the background.
      eventually("the end of a hold after an interruption at #{place}, the #{nth}th moment,") { !lock.held? }
      assert_nothing_left @key
    end
  end

  def test_that_no_moment_of_a_block_leaves_a_hold
    [NBLock::Lock, NBLock::ReentrantLock].product([false, true]) do |lock_class, contended|
      each_moment(:thread, contended, lock_class) { |lock| lock.synchronize { nil } }
    end
  end

  def test_that_no_moment_of_a_signal_leaves_a_hold
    [false, true].each { |contended| each_moment(:signal, contended) { |lock| lock.synchronize { nil } } }
  end

  def test_that_no_moment_of_an_unlock_leaves_a_hold
    each_moment(:thread, false) do |lock|
      lock.lock
      lock.unlock
    ensure
      # What a program does with a lock that it locked: whatever interrupts.
      lock.unlock if lock.held?
    end
  end

  # Likewise by threads: an interruption finds each wherever its turn has ended.
  def test_that_no_interruption_of_threads_leaves_a_hold
    random = Random.new
    # An interruption may come before a thread could say so itself.
    reported = Thread.report_on_exception
    Thread.report_on_exception = false
    50.times do
      threads = Array.new(2) do
        Thread.new do
          lock = NBLock::Lock.new(@key, expire: 3600, timeout: 600)
          loop do
            lock.synchronize {}
            # Else a thread keeps its turn for 0.1 s.
            Thread.pass if random.rand < 0.5
          end
        end
      end
      sleep random.rand * 0.003
      threads.each { |thread| random.rand < 0.5 ? thread.raise(Interruption) : thread.kill }
      threads.each do |thread|
        thread.join
      rescue Interruption
        nil
      end
      assert_nothing_left @key
    end
  ensure
    Thread.report_on_exception = reported
  end

  # What lock grants while it is interrupted is given back, or the caller can see that it is held.
  def test_that_an_interrupted_lock_is_not_left_unseen
    random = Random.new(1)
    300.times do
      lock = NBLock::Lock.new(@key, expire: 3600, timeout: 600)
      begin
        Timeout.timeout(random.rand * 0.0005 + 0.00001) { lock.lock }
      rescue Timeout::Error
        nil
      end
      lock.unlock if lock.held?
    end
    assert_nothing_left @key
  end

  def test_that_control_c_interrupts
    @holder.lock
    input, output, waiter = ruby(<<~'RUBY', "KEY" => @key)
      # A shell that runs the tests in the background has interrupts ignored, and they inherit that.
      trap(:INT, "DEFAULT")
      begin
        puts "waiting"
        NBLock::Lock.new(ENV.fetch("KEY"), expire: 3600).lock(timeout: 600)
      rescue Interrupt
        puts "interrupted"
        # Still there, so that nothing goes away merely because the process does.
        gets
      end
    RUBY
    assert_equal "waiting\n", output.gets
    # It is in its wait once the other process's status says that it sleeps.
    eventually("the process's wait") { File.read("/proc/#{waiter.pid}/stat").include?(") S ") }
    Process.kill(:INT, waiter.pid)
    assert_equal "interrupted\n", Timeout.timeout(PATIENCE) { output.gets }
    @holder.unlock
    assert_nothing_left @key
  ensure
    input&.close
    waiter&.join
  end

  def test_that_a_signal_handler_may_use_locks_during_a_wait
    @holder.lock
    seen = Queue.new
    other = fresh_key
    used = NBLock::Lock.new(other)
    used.synchronize {}
    before = trap(:USR2) { seen << used.synchronize { used.held? } }
    helper = Thread.new(Thread.main) do |main|
      eventually("the wait") { main.stop? }
      Process.kill(:USR2, Process.pid)
      assert seen.pop
      @holder.unlock
    end
    assert_nil @waiter.lock
    @waiter.unlock
    helper.join
  ensure
    trap(:USR2, before || "DEFAULT")
  end

  def test_that_closing_ends_waits
    @holder.lock(expire: 3600)
    waiter = waiting_thread { @waiter.lock }
    NBLock.close
    assert_raises(NBLock::Error::LockInvalidOp) { waiter.value }
  end

  def test_that_processes_wake_each_other
    @holder.lock
    input, output, waiter = ruby(<<~'RUBY', "KEY" => @key)
      lock = NBLock::Lock.new(ENV.fetch("KEY"))
      puts lock.try_lock
      lock.synchronize(timeout: 600) { puts "granted" }
    RUBY
    assert_equal "false\n", output.gets
    @holder.unlock
    assert_equal "granted\n", output.gets
  ensure
    input&.close
    waiter&.join
  end

  def test_that_a_wait_without_a_descriptor_is_an_error_and_leaves_nothing
    @holder.lock
    input, output, waiter = ruby(<<~'RUBY', "KEY" => @key)
      lock = NBLock::Lock.new(ENV.fetch("KEY"), expire: 3600, timeout: 60)
      p lock.try_lock
      files = []
      begin
        loop { files << File.open("/dev/null") }
      rescue Errno::EMFILE
        begin
          lock.lock
        rescue NBLock::Error::StoreError => e
          puts e.status
        end
      end
      gets
    RUBY
    assert_equal "false\n", output.gets
    assert_equal "resources\n", output.gets
    @holder.unlock
    assert_nothing_left @key
  ensure
    input&.close
    waiter&.join
  end
end

unless ENV["NBLOCK_TEST_RETHINKDB_URL"].to_s.empty?
  # Where answers take their time.
  class WaitingOnRethinkDBTest < WaitingTest
    def setup
      super
      use_store(ENV.fetch("NBLOCK_TEST_RETHINKDB_URL"))
    end
  end
end
