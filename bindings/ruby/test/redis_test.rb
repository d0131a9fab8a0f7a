# frozen_string_literal: true

require_relative "support"

# Locks on Redis, where the values of other programs stand under the same keys.
class RedisTest < Minitest::Test
  include Support

  SERVERS = File.expand_path("../../../tools/servers.sh", __dir__)

  # A Redis server, which ends with the test. Its values are set as any other program sets them.
  class Server
    def initialize(directory)
      @tool = IO.popen([SERVERS, "run", "redis", directory], "r+")
      @facts = {}
      # It prints the process id last.
      until @facts.key?("pid")
        name, value = @tool.gets&.chomp&.split("=", 2)
        raise "the server did not start: see what servers.sh printed" unless value

        @facts[name] = value
      end
    end

    def url
      @facts.fetch("url")
    end

    def command(text)
      TCPSocket.open("127.0.0.1", Integer(@facts.fetch("port"))) do |socket|
        socket.write("#{text}\r\n")
        socket.gets.chomp
      end
    end

    def end
      @tool.close
    end
  end

  def setup
    @server = Server.new(fresh_directory)
    use_store(@server.url)
  end

  def teardown
    NBLock.close
    @server.end
    super
  end

  def test_that_a_value_without_an_end_is_a_lock_without_an_end
    assert_equal "+OK", @server.command("SET another:forever value")
    lock = NBLock::Lock.new("another:forever")
    refute lock.try_lock
    record = NBLock::Lock.find("another:forever").record
    assert_predicate record, :foreign?
    refute_predicate record, :expired?
    assert_equal Float::INFINITY, record.remaining
    assert_nil record.expires_at
    error = assert_raises(NBLock::Error::LockUnavailable) { lock.lock(timeout: 0) }
    assert_includes error.message, "held by somebody else, with no end"
    refute record.break, "another program's data"
    assert_equal ":1", @server.command("DEL another:forever")
    lock.synchronize { refute_predicate NBLock::Lock.find("another:forever").record, :foreign? }
  end

  def test_that_a_value_with_an_end_is_a_lock_until_then
    assert_equal "+OK", @server.command("SET another:soon value PX 300")
    NBLock::Lock.new("another:soon").synchronize(timeout: 30) do
      refute_predicate NBLock::Lock.find("another:soon").record, :foreign?
    end
    assert_nil NBLock::Lock.find?("another:soon")
  end
end
