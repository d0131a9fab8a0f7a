# frozen_string_literal: true

# What an error says about the holder of a lock that was not granted, and who rescues it.
class UnavailableTest < StoreTest
  def setup
    super
    @key = fresh_key
    @lock = NBLock::Lock.new(@key)
  end

  def refused(&block)
    assert_raises(NBLock::Error::LockUnavailable, &block)
  end

  FORMS = {
    lock: ->(key) { NBLock::Lock.new(key).lock(timeout: 0) },
    waiting: ->(key) { NBLock::Lock.new(key).lock(timeout: 0.02) },
    synchronize: ->(key) { NBLock::Lock.new(key).synchronize(timeout: 0) { raise "granted" } },
    reentrant: ->(key) { NBLock::ReentrantLock.new(key).lock(timeout: 0) }
  }.freeze

  def test_that_another_process_is_named
    input, output, waiter = ruby(<<~'RUBY', "KEY" => @key)
      NBLock::Lock.new(ENV.fetch("KEY")).synchronize { puts "held"; gets }
    RUBY
    assert_equal "held\n", output.gets
    FORMS.each_value do |form|
      error = refused { form.call(@key) }
      assert_match(/#{@key}.* unavailable: held by #{Regexp.escape(Socket.gethostname)}:#{waiter.pid} .*, \d+\.\d s left/,
                   error.message)
      refute_includes error.message, "("
      assert_equal waiter.pid, error.holder.pid
    end
  ensure
    input&.close
    waiter&.join
  end

  def test_that_the_thread_itself_is_named
    @lock.synchronize do
      FORMS.each_value { |form| assert_includes refused { form.call(@key) }.message, "(this thread)" }
    end
  end

  def test_that_another_thread_or_fiber_of_the_process_is_named
    @lock.lock
    other = -> { refused { NBLock::Lock.new(@key).lock(timeout: 0) }.message }
    assert_includes Thread.new(&other).value, "(this process)"
    assert_includes Fiber.new(&other).resume, "(this process)"
    assert_includes other.call, "(this thread)"
    @lock.unlock
  end

  def test_that_a_parent_is_named
    program = <<~'RUBY'
      begin
        NBLock::Lock.new(ENV.fetch("KEY")).lock(timeout: 0)
      rescue NBLock::Error => e
        puts e.message
      end
    RUBY
    @lock.synchronize do
      said = ->(env) { ruby(program, { "KEY" => @key }.merge(env))[1].read }
      assert_includes said.call({}), "(a parent of this process)"
      assert_includes said.call("NBLOCK_KEY" => "another"), "(a parent of this process)"
      assert_includes said.call("NBLOCK_KEY" => @key), "NBLOCK_KEY)"
      assert_includes in_child { refused { NBLock::Lock.new(@key).lock(timeout: 0) }.message }, "(a parent of this process)"
    end
  end

  def test_that_a_long_key_is_cut
    lock = NBLock::Lock.new("long " * 1000, timeout: 0)
    lock.synchronize do
      message = refused { NBLock::Lock.new(lock.key).lock(timeout: 0) }.message
      assert_operator message.length, :<, 300
      assert_includes message, "held by"
    end
    assert_operator assert_raises(NBLock::Error::LockInvalidOp) { NBLock::Lock.new(lock.key).unlock }.message.length, :<, 300
    assert_operator lock.inspect.length, :<, 300
  end

  def test_that_every_error_of_ours_is_an_nblock_error
    (-10..7).each do |status|
      error = NBLock::Error.for(status, "in words")
      assert_kind_of NBLock::Error, error unless error.is_a?(ArgumentError)
      assert_kind_of RuntimeError, error unless error.is_a?(ArgumentError)
    end
    rescued =
      begin
        @lock.unlock
      rescue NBLock::Error => e
        e
      end
    assert_instance_of NBLock::Error::LockInvalidOp, rescued
    refute_kind_of NBLock::Error, RuntimeError.new
  end

  def test_that_a_lock_that_is_dumped_says_what_to_do_instead
    [@lock, NBLock::ReentrantLock.new(@key)].each do |lock|
      assert_match(/cannot be dumped: pass its key/, assert_raises(TypeError) { Marshal.dump(lock) }.message)
    end
  end

  # The store's word, which counts what is left more finely than milliseconds.
  def test_that_expired_is_what_the_store_says
    @lock.lock(expire: 0.03)
    record = eventually("the lease's end") { NBLock::Lock.expired.find { |lock| lock.key == @key }&.record }
    assert_predicate record, :expired?
    facts = record.to_h.merge(remaining: 0.0)
    refute_predicate NBLock::Record.new(**facts), :expired?
    assert_predicate NBLock::Record.new(**facts, expired: true), :expired?
    @lock.unlock
  end

  def in_trap(&block)
    said = Queue.new
    before = trap(:USR2) { said << (begin; block.call; rescue Exception => e; e; end) } # rubocop:disable Lint/RescueException
    Process.kill(:USR2, Process.pid)
    Timeout.timeout(PATIENCE) { said.pop }
  ensure
    trap(:USR2, before || "DEFAULT")
  end

  def test_that_a_signal_handler_is_told_what_to_do
    # The first use, of a lock and of the store, and closing.
    [-> { NBLock::Lock.new(@key).try_lock }, -> { NBLock.close }].each do |call|
      2.times do
        error = in_trap(&call)
        assert_instance_of NBLock::Error::LockInvalidOp, error
        assert_match(/signal handlers cannot do this.*Thread\.new/, error.message)
        @lock.synchronize {}
      end
    end
    # What it says to do.
    assert_equal(true, in_trap { @lock.try_lock })
    @lock.unlock
    in_trap { Thread.new { NBLock::Lock.new(@key).synchronize { @done = true } } }.join
    assert @done
    on_lost = NBLock::Lock.new(fresh_key).on_lost {}
    on_lost.synchronize {}
    assert_equal(:used, in_trap { on_lost.synchronize { :used } })
  end
end
