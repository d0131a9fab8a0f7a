# frozen_string_literal: true

require "minitest/autorun"
require "nblock"
require "bigdecimal"
require "fileutils"
require "open3"
require "rbconfig"
require "securerandom"
require "set"
require "socket"
require "timeout"
require "tmpdir"

# What the tests have in common: a store for each, fresh keys, waiting for events, and other processes.
module Support
  # How long an event may take before a test gives up on it. Far above what any takes.
  PATIENCE = 30

  # A key that no other test, or run of the tests, uses.
  def fresh_key(name = "test")
    "#{name}:#{SecureRandom.hex(8)}"
  end

  def use_store(url)
    NBLock.configure { |c| c.url = url }
  end

  # A fresh directory, removed after the test, for the embedded store.
  def fresh_directory
    (@directories ||= []) << Dir.mktmpdir("nblock-ruby-")
    @directories.last
  end

  def setup
    use_store("embedded:#{fresh_directory}")
  end

  def teardown
    NBLock.close
    @directories&.each { |directory| FileUtils.rm_rf(directory) }
  end

  # Waits for an event that nothing signals.
  def eventually(what)
    limit = now + PATIENCE
    until (value = yield)
      flunk "#{what} did not happen within #{PATIENCE} s" if now > limit
      sleep 0.005
    end
    value
  end

  def now
    Process.clock_gettime(Process::CLOCK_MONOTONIC)
  end

  # A thread that runs the block and has come to wait in it.
  def waiting_thread(&block)
    thread = Thread.new(&block)
    thread.report_on_exception = false
    eventually("the thread's wait") { thread.stop? }
    thread
  end

  # What another lock object, of this process, says of the key.
  def locked?(key)
    other = NBLock::Lock.new(key)
    other.try_lock ? (other.unlock || false) : true
  end

  # Waits until the key can be locked: what a cancelled wait leaves is given back in the background.
  def assert_nothing_left(key)
    other = NBLock::Lock.new(key, timeout: PATIENCE)
    other.lock
    other.unlock
  end

  # Runs a program in Ruby of its own, with this process's store, and returns its input, output and waiter.
  def ruby(program, env = {})
    env = { "NBLOCK_URL" => NBLock.config.url }.merge(env)
    input, output, waiter = Open3.popen2e(env, RbConfig.ruby, "-rnblock", "-e", "$stdout.sync = true\n#{program}")
    (@processes ||= []) << waiter
    [input, output, waiter]
  end

  # Runs a block in a forked child, and returns what it returned, through a pipe.
  def in_child
    reader, writer = IO.pipe
    pid = fork do
      reader.close
      result =
        begin
          yield
        rescue Exception => e # rubocop:disable Lint/RescueException -- the child has nobody else to tell
          "#{e.class}: #{e.message}"
        end
      writer.write(Marshal.dump(result))
      writer.close
      # No at_exit: the tests are the parent's.
      exit!(0)
    end
    writer.close
    result = Timeout.timeout(PATIENCE) { reader.read }
    Process.wait(pid)
    flunk "the child ended without an answer" if result.empty?
    Marshal.load(result) # rubocop:disable Security/MarshalLoad -- our own
  ensure
    reader&.close
  end
end

# A test on a store of its own.
class StoreTest < Minitest::Test
  include Support
end
