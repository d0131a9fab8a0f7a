# frozen_string_literal: true

# What programs rely on that were written for NoBrainer's locks: everything that its own specifications
# hold, in our words. Runs for every store, and beside NoBrainer for its own classes.

# What both kinds of lock do. `lock_class` says which, `errors` where its errors are.
module CommonBehaviour
  def errors
    NBLock::Error
  end

  def setup
    super
    @key = fresh_key
    @mine = lock_class.new(@key)
    @other = lock_class.new(@key)
  end

  def expired
    lock_class.expired.to_a
  end

  def assert_no_record
    assert_nil lock_class.find?(@key)
  end

  def test_that_a_block_is_alone_and_the_lock_is_free_afterwards
    assert_equal(:value, @mine.synchronize do
      refute @other.try_lock
      :value
    end)
    assert @other.try_lock
    @other.unlock
  end

  def test_that_keys_are_strings_or_symbols
    assert_raises(ArgumentError) { lock_class.new(1) }
    assert_raises(ArgumentError) { lock_class.new(Object.new) }
    assert_equal lock_class.new("a_key"), lock_class.new(:a_key)
  end

  def test_that_what_succeeds_returns_nil
    assert_nil @mine.lock
    # Another length: NoBrainer raises LostLock if the end of the lease stays the same by the millisecond.
    assert_nil @mine.refresh(expire: 61)
    assert_nil @mine.unlock
  end

  def test_that_waiting_ends_with_its_timeout
    @mine.lock(expire: 60)
    assert_raises(errors::LockUnavailable) { @other.lock(timeout: 0.3) }
    @mine.unlock
  end

  def test_that_a_lease_that_ran_out_is_taken_over
    @mine.lock(expire: 0.1)
    @other.lock
    assert_raises(errors::LostLock) { @mine.unlock }
    @other.unlock
    assert_no_record
  end

  def test_that_a_lock_is_lost_even_when_the_next_holder_is_gone_too
    @mine.lock(expire: 0.1)
    @other.lock
    @other.unlock
    assert_raises(errors::LostLock) { @mine.unlock }
    assert_no_record
  end

  def test_that_a_refresh_lengthens_the_lease
    @mine.lock(expire: 0.3)
    @mine.refresh(expire: 60)
    assert_raises(errors::LockUnavailable) { @other.lock(timeout: 0.6) }
    @mine.unlock
  end

  def test_that_a_refresh_finds_out_about_a_loss
    @mine.lock(expire: 0.1)
    @other.lock
    assert_raises(errors::LostLock) { @mine.refresh }
    @other.unlock
  end

  def test_that_a_refresh_never_takes_a_free_lock
    @mine.lock(expire: 0.1)
    @other.lock
    @other.unlock
    assert_raises(errors::LostLock) { @mine.refresh }
    assert_no_record
  end

  def test_that_an_expired_lock_is_found_and_can_be_recovered
    @mine.lock(expire: 0.05)
    found = eventually("the lease's end") { expired.find { |lock| lock.key == @key } }
    found.lock
    assert_raises(errors::LostLock) { @mine.refresh }
    found.unlock
  end

  def test_that_a_lock_is_no_document
    assert_raises(NotImplementedError) { @mine.save }
    assert_raises(NotImplementedError) { @mine.save? }
    assert_raises(NotImplementedError) { @mine.update({}) }
    assert_raises(NotImplementedError) { @mine.delete }
    assert_raises(NotImplementedError) { @mine.destroy }
  end

  def test_that_an_expire_can_be_the_locks_own
    mine = lock_class.new(@key, expire: 0.1)
    mine.lock
    @other.lock
    assert_raises(errors::LostLock) { mine.unlock }
    @other.unlock
  end

  def test_that_a_timeout_can_be_the_locks_own
    @mine.lock
    assert_raises(errors::LockUnavailable) { lock_class.new(@key, timeout: 0).lock }
    @mine.unlock
  end

  def test_that_a_free_lock_needs_no_time
    @mine.lock(timeout: 0.1)
    @mine.unlock
    @mine.lock(timeout: 0)
    @mine.unlock
  end

  def test_that_locks_are_found_by_key
    @mine.lock
    found = lock_class.find(@key)
    assert found.eql?(@mine)
    assert_equal @mine.hash, found.hash
    assert_includes lock_class.all.map(&:key), @key
    assert_operator lock_class.count, :>=, 1
    @mine.unlock
  end

  def test_that_options_are_checked
    assert_raises(ArgumentError) { @mine.lock(expires: 1) }
    assert_raises(ArgumentError) { @mine.try_lock(timeout: 1) }
    assert_raises(ArgumentError) { @mine.synchronize("timeout" => 1) {} }
  end
end

module LockBehaviour
  include CommonBehaviour

  def test_that_trying_takes_a_free_lock_only
    assert @mine.try_lock
    refute @other.try_lock
    @mine.unlock
    assert @other.try_lock
    @other.unlock
  end

  def test_that_one_object_locks_once
    @mine.lock
    assert_match(/already locked/, assert_raises(errors::LockInvalidOp) { @mine.lock }.message)
    assert_match(/already locked/, assert_raises(errors::LockInvalidOp) { @mine.try_lock }.message)
    assert_raises(errors::LockInvalidOp) { @mine.synchronize { flunk } }
    @mine.unlock
  end

  def test_that_only_what_is_locked_can_be_unlocked_or_refreshed
    assert_match(/not locked/, assert_raises(errors::LockInvalidOp) { @mine.unlock }.message)
    assert_match(/not locked/, assert_raises(errors::LockInvalidOp) { @mine.refresh }.message)
    @mine.synchronize {}
    assert_match(/not locked/, assert_raises(errors::LockInvalidOp) { @mine.unlock }.message)
    assert_match(/not locked/, assert_raises(errors::LockInvalidOp) { @mine.refresh }.message)
  end

  def test_that_a_block_may_unlock
    assert_equal(1, @mine.synchronize do
      @mine.unlock
      1
    end)
  end

  def test_that_a_lost_lock_can_be_locked_again
    @mine.lock(expire: 0.1)
    @other.lock
    assert_raises(errors::LostLock) { @mine.unlock }
    @other.unlock
    assert_nil @mine.lock
    assert_nil @mine.unlock
  end
end

module ReentrantLockBehaviour
  include CommonBehaviour

  def test_that_whoever_has_the_token_may_lock_again
    first = lock_class.new(@key, instance_token: "one owner")
    second = lock_class.new(@key, instance_token: "one owner")
    assert first.try_lock
    assert second.try_lock
    refute @other.try_lock
    assert first.try_lock
    first.unlock
    first.unlock
    refute @other.try_lock
    second.unlock
    assert @other.try_lock
    @other.unlock
    assert_no_record
  end

  def test_that_any_object_with_the_token_may_unlock
    lock_class.new(@key, instance_token: "one owner").lock
    lock_class.new(@key, instance_token: "one owner").unlock
    assert_no_record
  end

  def test_that_unlocking_what_nobody_locked_is_a_loss
    assert_raises(errors::LostLock) { @mine.unlock }
  end

  def test_that_one_object_may_lock_again
    @mine.lock
    @mine.synchronize { refute @other.try_lock }
    refute @other.try_lock
    @mine.unlock
    assert_no_record
  end
end
