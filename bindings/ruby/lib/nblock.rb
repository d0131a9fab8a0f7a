# frozen_string_literal: true

require "nblock/version"
require "nblock/library"
require "nblock/error"
require "nblock/exclusion"
require "nblock/operation"
require "nblock/options"
require "nblock/config"
require "nblock/client"
require "nblock/record"
require "nblock/holder"
require "nblock/loss_watcher"
require "nblock/lock"
require "nblock/reentrant_lock"

# Distributed locks with leases, loss detection and fencing.
#
#   NBLock::Lock.new("jobs:report").synchronize { report }
#
# The store is, in this order: the URL set with NBLock.configure, the environment variable NBLOCK_URL, NoBrainer's
# environment, /etc/nblock.conf, the store of this machine, which needs no server.
module NBLock
  @config = Config.new.freeze
  @clients = {}
  @last_used = nil
  @opening = Exclusion.new

  class << self
    # The configuration, read-only. NBLock.configure changes it.
    attr_reader :config

    # Yields the configuration so that the block can change it. Returns nil. A lock that is held stays in its
    # store; every lock uses the new store from its next grant on. Does not wait.
    #
    # Raises ArgumentError, and changes nothing, if a value is wrong.
    def configure
      changed = @config.dup
      yield changed
      @config = changed.freeze
      nil
    end

    # Checks that the store replies, and returns a Ping. Opens the store if it is not open yet. Waits at most
    # op_timeout; other threads and fibers run meanwhile. Raises StoreError if it does not reply.
    def ping
      client.ping
    end

    # Closes every store that is open. Holds that are renewed are released, plain leases run out, and calls of
    # this process that wait for a lock raise LockInvalidOp. The next use of a lock opens its store again.
    # Returns nil.
    #
    # Waits until the store has accepted the releases, at most op_timeout; other threads run meanwhile. Raises
    # StoreError if that was too short: what could not be released runs out with its lease. Raises LockInvalidOp
    # in a signal handler: call it from a thread instead.
    def close
      clients = @opening.synchronize { @clients.values.tap { @clients, @last_used = {}, nil } }
      clients.map(&:close).compact.each { |error| raise error }
      nil
    end

    # The store that the configuration names at this moment. Opens it if it is not open yet.
    def client # :nodoc:
      settings = @config.client_settings
      last, client = @last_used
      return client if last.equal?(settings)

      client = @clients[settings] || open_client(settings)
      @last_used = [settings, client].freeze
      client
    end

    private

    def open_client(settings)
      opened = Client.new(settings)
      # Two threads may both have opened it: the first one is kept.
      @opening.synchronize { @clients[settings] ||= opened }
    end
  end
end
