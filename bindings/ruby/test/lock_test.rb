# frozen_string_literal: true

# What locks do beside what NoBrainer's do, and what bad input gets.
class LockTest < StoreTest
  def setup
    super
    @key = fresh_key
    @lock = NBLock::Lock.new(@key)
  end

  def test_that_the_gem_tested_is_the_installed_one
    home = ENV.fetch("GEM_HOME")
    assert NBLock::Library::PATH.start_with?(home), "#{NBLock::Library::PATH} is not in #{home}"
    assert $LOADED_FEATURES.grep(%r{/nblock\.rb\z}).all? { |file| file.start_with?(home) }
  end

  def test_what_a_lock_tells_of_itself
    assert_equal @key, @lock.key
    assert_predicate @lock.key, :frozen?
    assert_equal [Digest::SHA1.digest(@key)].pack("m0"), @lock.key_hash
    assert_nil @lock.expires_at
    assert_nil @lock.instance_token
    refute @lock.held?
    refute @lock.lost?
    assert_equal :idle, @lock.state
    assert_match(/idle/, @lock.inspect)

    @lock.lock(expire: 100)
    assert @lock.held?
    refute @lock.lost?
    assert_equal :held, @lock.state
    assert_in_delta 100, @lock.remaining, 50
    assert_in_delta Time.now.to_f + 100, @lock.expires_at.to_f, 50
    assert_match(/\A\S{32,}\z/, @lock.instance_token)
    assert_match(/held/, @lock.inspect)
    refute_includes @lock.inspect, @lock.instance_token
    @lock.unlock
    assert_raises(NBLock::Error::LockInvalidOp) { @lock.remaining }
    assert_raises(NBLock::Error::LockInvalidOp) { @lock.fence }
  end

  def test_that_every_hold_has_another_token_and_a_greater_fence
    tokens = []
    fences = []
    3.times do
      @lock.synchronize do
        tokens << @lock.instance_token
        fences << @lock.fence
      end
    end
    assert_equal 3, tokens.uniq.size
    assert_equal fences.sort.uniq, fences
  end

  def test_what_a_record_tells
    @lock.lock(expire: 60)
    record = NBLock::Lock.find(@key).record
    assert_equal [@key, Process.pid, false, nil], [record.key, record.pid, record.expired?, record.lock_count]
    refute_predicate record, :foreign?
    assert_operator record.remaining, :>, 0
    assert_in_delta record.expires_at.to_f, NBLock::Lock.find(@key).expires_at.to_f, 5
    assert_in_delta Time.now.to_f, record.acquired_at.to_f, 30
    refute_empty record.host
    assert_predicate record, :frozen?
    @lock.unlock
    assert_raises(NBLock::Error::DocumentNotFound) { NBLock::Lock.find(@key) }
    assert_nil NBLock::Lock.find?(@key)
  end

  def test_that_a_record_names_the_program
    program = "require 'nblock'; l = NBLock::Lock.new('k'); l.lock; print NBLock::Lock.find('k').record.app; l.unlock"
    shown = lambda do |*command|
      paths = $LOAD_PATH.map { |path| "-I#{path}" }
      Open3.capture2({ "NBLOCK_URL" => "embedded:#{fresh_directory}" }, RbConfig.ruby, *paths, *command).first
    end
    ["nightly.rb", "#{"x" * 252}.rb"].each do |name|
      file = File.join(fresh_directory, name)
      File.write(file, "$0 = 'busy: 1/2'; #{program}")
      assert_equal name, shown.(file)
    end
    assert_equal "ruby", shown.("-e", program)
  end

  def test_that_one_hold_is_broken_and_no_other
    @lock.lock(expire: 60)
    record = NBLock::Lock.find(@key).record
    refute record.break(if_fence: record.fence + 1)
    refute record.break(if_owner: "#{record.host}:#{record.pid + 1}")
    refute record.break(if_version: "0" * 16)
    assert_raises(ArgumentError) { record.break(if_fence: record.fence.to_s) }
    ["", "host", ":1", "host:", "host:first", :host].each do |wrong|
      error = assert_raises(ArgumentError) { record.break(if_owner: wrong) }
      assert_includes error.message, "if_owner must be HOST:PID"
    end
    assert_equal record.version, NBLock::Lock.find(@key).record.version
    @lock.refresh
    refute record.break, "it has changed since"
    record = NBLock::Lock.find(@key).record
    assert record.break(if_fence: record.fence, if_owner: "#{record.host}:#{Process.pid}", if_version: record.version)
    assert_raises(NBLock::Error::LostLock) { @lock.unlock }
  end

  def test_that_kinds_of_locks_are_told_apart
    reentrant = NBLock::ReentrantLock.new(fresh_key)
    @lock.lock
    2.times { reentrant.lock }
    assert_equal [@lock, reentrant].to_set, NBLock::Lock.all.to_set
    assert_equal [reentrant], NBLock::ReentrantLock.all.to_a
    assert_equal 2, NBLock::ReentrantLock.find(reentrant.key).record.lock_count
    assert_equal 1, NBLock::ReentrantLock.count
    assert_nil NBLock::ReentrantLock.find?(@key)
    refute_equal NBLock::ReentrantLock.new(@key), @lock
  end

  def test_that_scopes_are_enumerable_and_lazy
    assert_empty NBLock::Lock.all
    assert_nil NBLock::Lock.expired.first
    keys = Array.new(5) { fresh_key }
    keys.each { |key| NBLock::Lock.new(key).lock(expire: 600) }
    assert_equal keys.sort, NBLock::Lock.all.map(&:key).sort
    assert_equal 2, NBLock::Lock.all.first(2).size
    assert_equal(1, NBLock::Lock.all.count { |lock| lock.key == keys.first })
    assert_empty NBLock::Lock.expired
    assert_kind_of Enumerator, NBLock::Lock.all.each
  end

  def test_that_a_damaged_record_says_so
    @lock.lock
    assert_nil NBLock::Lock.find(@key).record.damaged
    damage(@key)
    refute_empty NBLock::Lock.find(@key).record.damaged
    assert_match "damaged", assert_raises(NBLock::Error::StoreError) { NBLock::Lock.new(@key).try_lock }.message
    damage(@key)
    assert_nil NBLock::Lock.find(@key).record.damaged
    @lock.unlock
  end

  # Inverts the byte before the key in every copy of its record.
  def damage(key)
    files = Dir.glob("#{@directories.last}/**/table-*").select { |path| File.file?(path) }
    places = files.flat_map do |path|
      bytes = File.binread(path)
      at = -1
      Enumerator.produce { at = bytes.index(key.b, at + 1) or raise StopIteration }.map { |start| [path, start - 1] }
    end
    refute_empty places
    places.each do |path, at|
      byte = File.binread(path, 1, at).ord
      File.binwrite(path, (byte ^ 0xff).chr, at)
    end
  end

  def test_that_deleting_all_breaks_what_is_there
    @lock.lock
    NBLock::Lock.new(fresh_key).lock
    assert_equal 2, NBLock::Lock.all.delete_all
    assert_equal 0, NBLock::Lock.all.delete_all
    assert_raises(NBLock::Error::LostLock) { @lock.unlock }
  end

  def test_that_only_expired_ones_are_deleted_from_those
    NBLock::Lock.new(fresh_key).lock(expire: 0.02)
    @lock.lock
    eventually("the lease's end") { !NBLock::Lock.expired.empty? }
    assert_equal 1, NBLock::Lock.expired.delete_all
    assert_nil @lock.unlock
  end

  def test_that_durations_are_numeric_or_like_active_supports
    duration = Struct.new(:to_f)
    [1, 0.5, Rational(1, 2), BigDecimal("0.5"), duration.new(5.0)].each do |seconds|
      @lock.lock(expire: seconds, timeout: seconds)
      assert_operator @lock.remaining, :<=, seconds.to_f
      begin
        @lock.unlock
      rescue NBLock::Error::LostLock
        flunk "#{seconds.inspect} was too short a lease" if seconds.to_f > 1
      end
    end
  end

  def test_that_waiting_can_be_for_ever_or_not_at_all
    @lock.lock(timeout: Float::INFINITY)
    other = NBLock::Lock.new(@key)
    [0, -1, -0.001].each { |none| assert_raises(NBLock::Error::LockUnavailable) { other.lock(timeout: none) } }
    waiter = waiting_thread { other.lock(timeout: Float::INFINITY) }
    @lock.unlock
    assert_nil waiter.value
    other.unlock
  end

  # The wrong value of each option, and what the message has to name.
  WRONG = {
    expire: [0, -1, 0.0001, 366 * 86_400 + 1, Float::INFINITY, Float::NAN, "60", :soon, [], true, Time.at(0), 1i],
    timeout: [Float::NAN, "10", :soon, {}, false, Time.at(0), 1i],
    auto_refresh: [1, "yes", :on]
  }.freeze

  def test_that_wrong_values_are_refused_in_words
    WRONG.each do |option, values|
      values.each do |value|
        [-> { @lock.lock(option => value) }, -> { NBLock::Lock.new(@key, option => value) },
         -> { @lock.synchronize(option => value) { flunk } }].each do |call|
          message = assert_raises(ArgumentError, "#{option}: #{value.inspect}", &call).message
          assert_match(/\A#{option} must be .* \(got #{Regexp.escape(value.inspect)}\)\z/, message)
        end
      end
    end
    assert_raises(ArgumentError) { @lock.synchronize }
    assert_raises(ArgumentError) { @lock.lock(5) }
    assert_raises(ArgumentError) { @lock.refresh(timeout: 1) }
    assert_raises(ArgumentError) { NBLock::Lock.new(@key, instance_token: "x") }
    assert_raises(ArgumentError) { @lock.on_lost }
    refute locked?(@key)
  end

  def test_what_keys_can_be
    [1, 1.5, nil, true, [], {}, Object.new].each do |key|
      message = assert_raises(ArgumentError) { NBLock::Lock.new(key) }.message
      assert_match(/\Akey must be a String or a Symbol \(got /, message)
    end
    ["", "x" * (1 << 20).succ, "\xff", "\xff".b, "x".encode("UTF-16LE").force_encoding("UTF-8") + "\xfe"].each do |key|
      assert_raises(ArgumentError, key[0, 20].inspect) { NBLock::Lock.new(key) }
    end
    ["x" * (1 << 20), "nul\0inside", "żółw", "żółw".b, "żółw".encode("UTF-16"), :"a symbol", " "].each do |key|
      lock = NBLock::Lock.new(key)
      assert_equal(lock.key, lock.synchronize { NBLock::Lock.find(key).key })
      assert_equal Encoding::UTF_8, lock.key.encoding
    end
    assert_equal NBLock::Lock.new("żółw").key_hash, NBLock::Lock.new("żółw".encode("UTF-16")).key_hash
  end

  def test_that_a_key_is_not_changed_from_outside
    key = +"changing"
    lock = NBLock::Lock.new(key)
    key << "!"
    assert_equal "changing", lock.key
  end

  def test_what_owner_tokens_can_be
    ["", "x" * 256, "nul\0", 5, :symbol, "\xff"].each do |token|
      assert_raises(ArgumentError, token.inspect) { NBLock::ReentrantLock.new(@key, instance_token: token) }
    end
    assert_equal "mine", NBLock::ReentrantLock.new(@key, instance_token: "mine").instance_token
    lock = NBLock::ReentrantLock.new(@key)
    assert_equal lock.instance_token, lock.instance_token
    refute_equal lock.instance_token, NBLock::ReentrantLock.new(@key).instance_token
  end

  def test_that_the_block_of_a_reentrant_lock_may_unlock
    lock = NBLock::ReentrantLock.new(@key)
    assert_equal(1, lock.synchronize do
      lock.unlock
      1
    end)
  end

  def test_that_a_copy_is_another_lock
    @lock.lock
    copy = @lock.dup
    assert_equal @lock, copy
    refute copy.held?
    refute copy.try_lock
    @lock.unlock
    assert copy.try_lock
    copy.unlock
  end

  def test_configuration
    assert_equal({ expire: 60, timeout: 10 }, NBLock.config.lock_options)
    NBLock.configure { |c| c.lock_options = { timeout: 0 } }
    assert_equal({ expire: 60, timeout: 0 }, NBLock.config.lock_options)
    @lock.lock
    assert_in_delta 60, @lock.remaining, 30
    assert_raises(NBLock::Error::LockUnavailable) { NBLock::Lock.new(@key).lock }
    NBLock.configure { |c| c.lock_options = { expire: 600 } }
    @lock.unlock
    @lock.synchronize { assert_in_delta 600, @lock.remaining, 60 }
  ensure
    NBLock.configure { |c| c.lock_options = nil }
  end

  def test_that_a_wrong_configuration_changes_nothing
    before = NBLock.config
    [[:url=, 5], [:url=, "a\0b"], [:app_name=, :x], [:lock_options=, { expires: 1 }], [:lock_options=, { expire: -1 }],
     [:op_timeout=, 0], [:connect_timeout=, "5"]].each do |setter, value|
      assert_raises(ArgumentError) { NBLock.configure { |c| c.public_send(setter, value) } }
    end
    assert_same before, NBLock.config
    assert_raises(FrozenError) { NBLock.config.url = "memory:" }
  end

  def test_that_a_wrong_url_is_refused_at_first_use_and_shows_no_password
    use_store("rethinkdb://user:hunter2@host:0/x")
    error = assert_raises(ArgumentError) { @lock.lock }
    refute_includes error.message, "hunter2"
    refute_includes NBLock.config.inspect, "hunter2"
    use_store("nonsense:")
    assert_includes assert_raises(ArgumentError) { @lock.lock }.message, "nonsense"
  end

  def test_that_a_held_lock_stays_in_its_store
    @lock.lock
    use_store("memory:elsewhere")
    assert NBLock::Lock.new(@key).try_lock
    assert_nil @lock.unlock
    assert_raises(NBLock::Error::LockUnavailable) { @lock.lock(timeout: 0) }
  end

  def test_that_a_ping_answers
    ping = NBLock.ping
    refute_empty ping.server
    refute_empty ping.location
    assert_operator ping.round_trip, :<, 60
    assert_nil ping.skew
    assert_equal [], ping.caveats
  end

  def test_that_closing_releases_what_is_renewed_and_nothing_else
    renewed = NBLock::Lock.new(fresh_key)
    renewed.lock(auto_refresh: true)
    @lock.lock
    NBLock.close
    refute locked?(renewed.key)
    assert locked?(@key)
    assert_raises(NBLock::Error::LockInvalidOp) { @lock.unlock }
    # The object can be used again: it is a new lock, on the store that was opened again.
    assert_raises(NBLock::Error::LockUnavailable) { @lock.lock(timeout: 0) }
  end

  def test_that_threads_may_share_an_object
    turns = Queue.new
    threads = Array.new(8) do |index|
      Thread.new do
        20.times do
          @lock.synchronize(timeout: PATIENCE) { turns << index }
        rescue NBLock::Error::LockInvalidOp
          # Another thread uses this very object, as NoBrainer says it too.
          Thread.pass
          retry
        end
      end
    end
    threads.each(&:join)
    assert_equal 160, turns.size
    refute locked?(@key)
  end
end
