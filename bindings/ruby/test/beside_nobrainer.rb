# frozen_string_literal: true

# Beside NoBrainer itself, whose sources the environment names: see test.sh.
require_relative "support"

# What was there before NoBrainer's namesakes.
LOST_LOCK_OF_BEFORE = NBLock::Error::LostLock

require "nblock/nobrainer"
require_relative "behaviour"

SERVER = ENV["NBLOCK_TEST_RETHINKDB_URL"].to_s

# Tests that need no server.
class BesideNoBrainerTest < Minitest::Test
  include Support

  def setup
    NBLock.configure { |c| c.url = nil }
    nobrainer("rethinkdb://localhost/some_db")
  end

  def nobrainer(*urls, **settings)
    NoBrainer::Config.reset!
    NoBrainer.configure do |c|
      c.app_name = "app"
      c.environment = "production"
      c.rethinkdb_urls = urls
      settings.each { |name, value| c.public_send("#{name}=", value) }
    end
  end

  def test_that_errors_are_nobrainers_too
    %i[LockUnavailable LostLock LockInvalidOp DocumentNotFound].each do |name|
      assert_operator NBLock::Error.const_get(name), :<, NoBrainer::Error.const_get(name)
      assert_operator NBLock::Error.const_get(name), :<, RuntimeError
      assert_equal "NBLock::Error::#{name}", NBLock::Error.const_get(name).name
    end
    use_store("memory:")
    lock = NBLock::Lock.new("k")
    error = assert_raises(NoBrainer::Error::LockInvalidOp) { lock.unlock }
    assert_instance_of NBLock::Error::LockInvalidOp, error
    lock.lock
    NBLock::Lock.all.delete_all
    begin
      lock.unlock
    rescue LOST_LOCK_OF_BEFORE
      rescued = true
    end
    assert rescued
  end

  def test_that_the_url_is_nobrainers
    assert_equal "rethinkdb://localhost:28015/some_db?create=1", NBLock.config.url
    assert_equal "app", NBLock.config.app_name
    nobrainer("rethinkdb://us%40er:p%2Fw%3A@a:1/x", "rethinkdb://us%40er:p%2Fw%3A@[::1]:2/x",
              run_options: { durability: :soft })
    assert_equal "rethinkdb://us%40er:p%2Fw%3A@a:1,[::1]:2/x?create=1&durability=soft", NBLock.config.url
    refute_includes NBLock.config.inspect, "p%2Fw"
    nobrainer("rethinkdb://a/x", ssl_options: { ca_certs: "/etc/ca certs.pem" })
    assert_equal "rethinkdb://a:28015/x?create=1&tls=1&ca=%2Fetc%2Fca%20certs.pem", NBLock.config.url
    NBLock.configure { |c| c.url = "memory:" }
    assert_equal "memory:", NBLock.config.url
  end

  def test_that_the_database_is_that_of_the_moment
    NoBrainer.run_with(db: "other") { assert_includes NBLock.config.url, "/other?" }
    NoBrainer.run_with(db: :symbol) { assert_includes NBLock.config.url, "/symbol?" }
    assert_includes NBLock.config.url, "/some_db?"
  end

  def test_that_lock_options_are_nobrainers_unless_given
    assert_equal({ expire: 60, timeout: 10 }, NBLock.config.lock_options)
    nobrainer("rethinkdb://a/x", lock_options: { expire: 5, timeout: 0 })
    assert_equal({ expire: 5, timeout: 0 }, NBLock.config.lock_options)
    use_store("memory:")
    lock = NBLock::Lock.new("k")
    2.times do |again|
      nobrainer("rethinkdb://a/x", lock_options: { expire: 500 + again * 500, timeout: 0 })
      lock.synchronize { assert_in_delta 500 + again * 500, lock.remaining, 200 }
    end
    NBLock.configure { |c| c.lock_options = { expire: 7 } }
    assert_equal({ expire: 7, timeout: 10 }, NBLock.config.lock_options)
  ensure
    NBLock.configure { |c| c.lock_options = nil }
  end

  def test_that_active_supports_durations_are_durations
    require "active_support/duration"
    use_store("memory:")
    lock = NBLock::Lock.new("k")
    lock.lock(expire: ActiveSupport::Duration.build(90), timeout: ActiveSupport::Duration.build(1))
    assert_in_delta 90, lock.remaining, 30
    lock.unlock
  end

  def test_that_nobrainer_without_a_configuration_is_left_alone
    NoBrainer::Config.reset!
    assert_nil NBLock.config.url
    assert_equal({ expire: 60, timeout: 10 }, NBLock.config.lock_options)
  end
end

if SERVER.empty?
  puts "SKIPPED ruby-nobrainer-rethinkdb: NBLOCK_TEST_RETHINKDB_URL does not name a server"
else
  # With a server, in a database of its own.
  class NoBrainerServerTest < Minitest::Test
    include Support

    DATABASE = "nblock_ruby_#{SecureRandom.hex(4)}"
    Minitest.after_run { NoBrainer.run { |r| r.db_drop(DATABASE) } }

    def setup
      NBLock.configure { |c| c.url = nil }
      NoBrainer::Config.reset!
      NoBrainer.configure do |c|
        c.app_name = "nblock"
        c.environment = "test"
        c.rethinkdb_urls = [SERVER.sub(%r{\A(rethinkdb://[^/]+)/.*\z}m, "\\1/#{DATABASE}")]
        c.distributed_lock_class = "NBLock::Lock"
      end
      self.class.table_ready
    end

    # Database and table are made by the first lock; until the table has its primary, a server takes no writes.
    def self.table_ready
      @@table_ready ||= NBLock::Lock.new("first").synchronize(timeout: 60) { true }
    end
  end

  # The same behaviour of both libraries, by the same tests: what they ask of ours is what NoBrainer's do.
  { NBLock::Lock => LockBehaviour, NBLock::ReentrantLock => ReentrantLockBehaviour,
    NoBrainer::Lock => LockBehaviour, NoBrainer::ReentrantLock => ReentrantLockBehaviour }.each do |lock_class, behaviour|
    tests = Class.new(NoBrainerServerTest) do
      include behaviour
      define_method(:lock_class) { lock_class }
      define_method(:errors) { NoBrainer::Error }
      # NoBrainer keeps what it found.
      define_method(:expired) { lock_class.expired.without_cache.to_a } if lock_class <= NoBrainer::Lock
    end
    Object.const_set("#{lock_class.name.delete(":")}WithServer", tests)
  end

  # Both libraries on one table.
  class InteropTest < NoBrainerServerTest
    def setup
      super
      @key = fresh_key
      @ours = NBLock::Lock.new(@key)
      @theirs = NoBrainer::Lock.new(@key)
    end

    def test_that_each_is_refused_by_the_other
      @ours.synchronize { refute @theirs.try_lock }
      @theirs.synchronize do
        refute @ours.try_lock
        assert_raises(NoBrainer::Error::LockUnavailable) { @ours.lock(timeout: 0.2) }
      end
      assert @ours.try_lock
      @ours.unlock
    end

    def test_that_each_takes_over_from_the_other
      @ours.lock(expire: 0.2)
      @theirs.lock
      assert_raises(NoBrainer::Error::LostLock) { @ours.unlock }
      @theirs.unlock
      @theirs.lock(expire: 0.2)
      @ours.lock
      assert_raises(NoBrainer::Error::LostLock) { @theirs.unlock }
      @ours.unlock
    end

    def test_that_a_release_of_theirs_wakes_ours
      @theirs.lock
      waiter = waiting_thread { @ours.synchronize(timeout: 600) { :granted } }
      @theirs.unlock
      assert_equal :granted, waiter.value
    end

    def test_that_each_lists_the_others
      @ours.lock
      assert_equal @key, NoBrainer::Lock.find(@key).key
      assert_equal @ours.key_hash, NoBrainer::Lock.find(@key).key_hash
      @ours.unlock
      @theirs.lock
      assert_includes NBLock::Lock.all.map(&:key), @key
      assert_nil NBLock::Lock.find(@key).record.pid
      assert_predicate NBLock::Lock.find(@key).record, :foreign?
      assert_in_delta Time.now.to_f + 60, NBLock::Lock.find(@key).expires_at.to_f, 20
      @theirs.unlock
    end

    def test_that_a_reentrant_lock_is_held_by_both
      token = SecureRandom.hex
      ours = NBLock::ReentrantLock.new(@key, instance_token: token)
      theirs = NoBrainer::ReentrantLock.new(@key, instance_token: token)
      ours.lock
      assert theirs.try_lock
      assert_equal 2, NBLock::ReentrantLock.find(@key).record.lock_count
      refute NBLock::ReentrantLock.new(@key).try_lock
      ours.unlock
      refute NoBrainer::ReentrantLock.new(@key).try_lock
      theirs.unlock
      assert_nil NBLock::Lock.find?(@key)
    end

    class Person
      include NoBrainer::Document
      field :name, type: String, uniq: true
      field :age, type: Integer
    end

    # The class that NoBrainer asks for locks, from here on.
    def locks_asked_for
      keys = Queue.new
      counted = Class.new(NBLock::Lock) do
        define_method(:lock) do |options = {}|
          keys << key
          super(options)
        end
      end
      NoBrainer::Config.distributed_lock_class = counted
      yield
      Array.new(keys.size) { keys.pop }
    end

    def test_that_uniqueness_is_kept_by_our_locks
      names = Array.new(5) { SecureRandom.hex(4) }
      keys = locks_asked_for do
        threads = Array.new(4) { Thread.new { names.map { |name| Person.new(name: name).save? } } }
        assert_equal 5, threads.flat_map(&:value).count(true)
      end
      assert_equal 5, Person.where(:name.in => names).count
      assert_equal 20, keys.size
      assert_equal(5, keys.uniq.size)
      assert keys.all? { |key| key.start_with?("uniq:#{DATABASE}:") && NBLock::Lock.find?(key).nil? }
    end

    def test_that_first_or_create_creates_once
      name = SecureRandom.hex(4)
      keys = locks_asked_for do
        threads = Array.new(4) { |age| Thread.new { Person.where(name: name).first_or_create(age: age).age } }
        assert_equal 1, threads.map(&:value).uniq.size
      end
      assert_equal 1, Person.where(name: name).count
      refute_empty keys
      assert_nil NBLock::Lock.find?(keys.first)
    end

    def test_that_another_database_has_other_locks_and_is_created
      other = "#{DATABASE}_other"
      @ours.lock
      NoBrainer.run_with(db: other) do
        lock = NBLock::Lock.new(@key)
        lock.synchronize { assert_equal 1, NoBrainer::Lock.count }
        assert_nil NBLock::Lock.find?(@key)
        # A held lock stays where it is.
        assert_nil @ours.refresh
        @ours.unlock
      end
      assert_nil NBLock::Lock.find?(@key)
    ensure
      NoBrainer.run { |r| r.db_drop(other) }
    end
  end
end
