# frozen_string_literal: true

# Preforking servers: locks of the parent in forked children (R16), with real processes.
class ForkTest < StoreTest
  def setup
    super
    @key = fresh_key
    @lock = NBLock::Lock.new(@key)
  end

  def test_that_a_childs_view_of_its_parents_hold_is_that_it_is_the_parents
    @lock.lock
    seen = in_child do
      answers = [@lock.held?, @lock.lost?, @lock.state]
      %i[unlock refresh].each do |call|
        @lock.public_send(call)
      rescue NBLock::Error::Forked, NBLock::Error::LockInvalidOp => e
        answers << e.class
      end
      answers << @lock.try_lock
    end
    # Reported once, and idle then; the key is the parent's still.
    assert_equal [false, false, :forked, NBLock::Error::Forked, NBLock::Error::LockInvalidOp, false], seen
    assert @lock.held?
    assert_nil @lock.refresh
    assert_nil @lock.unlock
  end

  def test_that_idle_locks_work_in_children_and_exclude_each_other
    @lock.synchronize {}
    file = File.join(fresh_directory, "count")
    File.write(file, "0")
    children = Array.new(4) do
      fork do
        50.times { @lock.synchronize(timeout: 60) { File.write(file, File.read(file).to_i + 1) } }
        exit!(0)
      end
    end
    50.times { @lock.synchronize(timeout: 60) { File.write(file, File.read(file).to_i + 1) } }
    children.each { |pid| assert_predicate Process.wait2(pid).last, :success? }
    assert_equal "250", File.read(file)
  end

  def test_that_a_child_may_wait_for_its_parent
    @lock.lock
    reader, writer = IO.pipe
    pid = fork do
      writer.puts "waits"
      NBLock::Lock.new(@key).lock(timeout: 60)
      writer.puts "granted"
      exit!(0)
    end
    assert_equal "waits\n", reader.gets
    @lock.unlock
    assert_equal "granted\n", Timeout.timeout(PATIENCE) { reader.gets }
    Process.wait(pid)
  end

  def test_that_a_child_leaves_its_parents_block_quietly
    side = @lock.synchronize do
      pid = fork
      next :child if pid.nil?

      assert_predicate Process.wait2(pid).last, :success?
      assert @lock.held?
      :parent
    end
    exit!(0) if side == :child
    refute locked?(@key)
  end

  def test_that_renewals_stay_with_the_parent
    @lock.lock(expire: 2, auto_refresh: true)
    in_child { NBLock::Lock.new(fresh_key).synchronize {} }
    other = NBLock::Lock.new(@key)
    assert_raises(NBLock::Error::LockUnavailable) { other.lock(timeout: 3) }
    @lock.unlock
  end

  def test_that_a_fork_beside_waiting_threads_does_not_hang
    @lock.lock
    waiters = Array.new(3) { waiting_thread { NBLock::Lock.new(@key, timeout: 600).synchronize {} } }
    other = fresh_key
    assert_equal(:locked, in_child { NBLock::Lock.new(other).synchronize { :locked } })
    @lock.unlock
    waiters.each(&:join)
  end

  def test_that_tokens_differ_on_both_sides
    @lock.synchronize {}
    tokens = Array.new(3) { in_child { @lock.synchronize { @lock.instance_token } } }
    tokens << @lock.synchronize { @lock.instance_token }
    assert_equal 4, tokens.uniq.size
  end

  def test_that_a_reentrant_lock_without_a_given_token_has_another_owner_in_a_child
    lock = NBLock::ReentrantLock.new(@key)
    lock.lock
    assert_equal(false, in_child { lock.try_lock })
    lock.unlock
    given = NBLock::ReentrantLock.new(@key, instance_token: "shared on purpose")
    given.lock
    assert_equal(true, in_child { given.try_lock && given.unlock.nil? })
    given.unlock
  end

  def test_that_on_lost_works_in_a_child
    calls = Queue.new
    lock = NBLock::Lock.new(@key).on_lost { calls << :lost }
    lock.synchronize {}
    told = in_child do
      lock.lock(expire: 0.02)
      Timeout.timeout(PATIENCE) { calls.pop }
    end
    assert_equal :lost, told
    assert_empty calls
  end

  def test_that_collecting_in_a_child_disturbs_nothing
    @lock.lock(expire: 2, auto_refresh: true)
    in_child do
      @lock = nil
      3.times { GC.start }
    end
    assert_raises(NBLock::Error::LockUnavailable) { NBLock::Lock.new(@key).lock(timeout: 3) }
    assert @lock.held?
    @lock.unlock
  end

  # As servers do it that have hooks around fork, or that compact before.
  def test_that_hooks_around_fork_change_nothing
    _, output, waiter = ruby(<<~'RUBY', "KEY" => @key)
      Process.singleton_class.prepend(Module.new { def _fork = super.tap { |pid| $hook = pid.zero? } })
      lock = NBLock::Lock.new(ENV.fetch("KEY"))
      lock.synchronize {}
      GC.compact if GC.respond_to?(:compact)
      Process.warmup if Process.respond_to?(:warmup)
      pids = Array.new(3) { fork { exit!($hook && lock.synchronize(timeout: 30) { lock.held? } ? 0 : 1) } }
      puts pids.map { |pid| Process.wait2(pid).last.success? }.inspect
    RUBY
    assert_equal "[true, true, true]\n", output.read
    waiter.join
  end
end

unless ENV["NBLOCK_TEST_RETHINKDB_URL"].to_s.empty?
  # Where a child needs a connection of its own.
  class ForkOnRethinkDBTest < ForkTest
    def setup
      super
      use_store(ENV.fetch("NBLOCK_TEST_RETHINKDB_URL"))
    end
  end
end
