# frozen_string_literal: true

# Losing a lock, being notified, and locks that nobody refers to any more.
class LossTest < StoreTest
  def setup
    super
    @key = fresh_key
    @lock = NBLock::Lock.new(@key)
  end

  def break_it
    assert_equal 1, NBLock::Lock.all.delete_all
  end

  def test_that_a_lease_that_nobody_renews_is_overdue
    @lock.lock(expire: 0.05)
    eventually("the lease's end") { @lock.lost? }
    refute @lock.held?
    assert_in_delta 0, @lock.remaining, 0.0001
    # Nobody took it: it can still be refreshed.
    @lock.refresh(expire: 60)
    assert @lock.held?
    refute @lock.lost?
    @lock.unlock
  end

  def test_that_leaving_a_block_tells_of_a_loss
    error = assert_raises(NBLock::Error::LostLock) { @lock.synchronize { break_it } }
    assert_nil error.cause
    refute @lock.lost?
    assert_equal(:again, @lock.synchronize { :again })
  end

  def test_that_a_loss_outdoes_the_blocks_own_exception
    error = assert_raises(NBLock::Error::LostLock) do
      @lock.synchronize do
        break_it
        raise IOError, "the block's"
      end
    end
    assert_kind_of IOError, error.cause
  end

  def test_that_the_blocks_exception_comes_through_and_the_lock_is_free
    assert_raises(IOError) { @lock.synchronize { raise IOError } }
    assert_equal(:thrown, catch(:out) { @lock.synchronize { throw :out, :thrown } })
    assert_equal(:broken, @lock.synchronize { break :broken })
    refute locked?(@key)
  end

  def test_that_what_the_block_unlocked_is_not_unlocked_again
    other = NBLock::Lock.new(@key)
    @lock.synchronize do
      @lock.unlock
      other.lock
    end
    assert other.held?
    other.unlock
  end

  def test_that_a_block_is_renewed_unless_an_expire_is_named
    NBLock.configure { |c| c.lock_options = { expire: 2 } }
    other = NBLock::Lock.new(@key, expire: 60)
    @lock.synchronize do
      first = NBLock::Lock.find(@key).expires_at
      eventually("a renewal") { NBLock::Lock.find(@key).expires_at > first + 0.1 }
    end
    assert_raises(NBLock::Error::LostLock) { @lock.synchronize(expire: 0.1) { other.lock } }
    other.unlock
    named = NBLock::Lock.new(@key, expire: 0.1)
    assert_raises(NBLock::Error::LostLock) { named.synchronize { other.lock } }
    other.unlock
    assert_raises(NBLock::Error::LostLock) { @lock.synchronize(auto_refresh: false) { other.lock } }
    other.unlock
  ensure
    NBLock.configure { |c| c.lock_options = nil }
  end

  def test_that_on_lost_is_called_on_a_thread_of_its_own
    calls = Queue.new
    assert_same @lock, @lock.on_lost { |lock| calls << [lock, Thread.current, lock.lost?] }
    @lock.lock(auto_refresh: true, expire: 0.6)
    break_it
    lock, thread, lost = Timeout.timeout(PATIENCE) { calls.pop }
    assert_same @lock, lock
    refute_same Thread.current, thread
    assert lost
    assert_raises(NBLock::Error::LostLock) { @lock.unlock }
    assert_empty calls

    # And of the next hold's loss again: this one is merely past its lease.
    @lock.lock(expire: 0.05)
    Timeout.timeout(PATIENCE) { calls.pop }
    @lock.unlock
    assert_empty calls
  end

  def test_that_on_lost_is_called_again_after_a_recovery
    calls = Queue.new
    @lock.on_lost { calls << :lost }
    @lock.lock(expire: 0.05)
    3.times do
      Timeout.timeout(PATIENCE) { calls.pop }
      @lock.refresh(expire: 0.05)
    end
    Timeout.timeout(PATIENCE) { calls.pop }
    # Overdue and then lost is one loss.
    break_it
    assert_raises(NBLock::Error::LostLock) { @lock.refresh }
    last = NBLock::Lock.new(fresh_key).on_lost { calls << :last }
    last.lock(expire: 0.05)
    assert_equal :last, Timeout.timeout(PATIENCE) { calls.pop }
    last.unlock
    assert_empty calls
  end

  def test_that_on_lost_can_be_asked_for_while_held_and_is_not_called_without_a_loss
    calls = Queue.new
    kept = NBLock::Lock.new(fresh_key)
    kept.on_lost { calls << :kept }
    @lock.lock(expire: 0.1)
    kept.synchronize do
      @lock.on_lost { calls << :lost }
      assert_equal :lost, Timeout.timeout(PATIENCE) { calls.pop }
    end
    @lock.unlock
    assert_empty calls
  end

  def test_that_one_slow_block_delays_no_other
    release = Queue.new
    called = Queue.new
    slow = NBLock::Lock.new(fresh_key).on_lost { release.pop }
    quick = NBLock::Lock.new(fresh_key).on_lost { called << :quick }
    slow.lock(expire: 0.02)
    eventually("the first loss") { slow.lost? }
    quick.lock(expire: 0.02)
    assert_equal :quick, Timeout.timeout(PATIENCE) { called.pop }
  ensure
    release << :done
  end

  # Makes locks in a thread whose stack is gone afterwards, so that nothing refers to them.
  def forget(count)
    Thread.new { count.times { yield } && nil }.join
  end

  # Forgets many: Ruby's collector is conservative, and may keep one for a stale reference.
  def forgotten_keys(options)
    keys = Array.new(20) { fresh_key }
    left = keys.dup
    forget(20) { NBLock::Lock.new(left.pop).try_lock(options) }
    keys
  end

  def test_that_a_forgotten_lock_is_renewed_no_more
    keys = forgotten_keys({ expire: 0.3, auto_refresh: true })
    eventually("the end of most leases") do
      GC.start
      NBLock::Lock.expired.count { |lock| keys.include?(lock.key) } >= 15
    end
  end

  def test_that_a_forgotten_lease_goes_on_for_as_long_as_it_was_given
    keys = forgotten_keys({ expire: 86_400 })
    5.times { GC.start }
    keys.each { |key| refute NBLock::Lock.new(key).try_lock }
  end

  def test_that_a_forgotten_lock_with_on_lost_is_collected_too
    keys = Array.new(20) { fresh_key }
    left = keys.dup
    forget(20) do
      lock = NBLock::Lock.new(left.pop)
      lock.on_lost { lock }
      lock.try_lock(expire: 0.3, auto_refresh: true)
    end
    eventually("the end of most leases") do
      GC.start
      NBLock::Lock.expired.count { |lock| keys.include?(lock.key) } >= 15
    end
  end

  def test_that_many_locks_come_and_go
    before = Dir.children("/proc/self/fd").size
    2000.times { NBLock::Lock.new(@key).synchronize {} }
    GC.start
    assert_operator Dir.children("/proc/self/fd").size, :<=, before + 5
  end
end
