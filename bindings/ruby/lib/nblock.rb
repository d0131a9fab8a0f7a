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
# Which store is used: what NBLock.configure says, else the environment's NBLOCK_URL, else
# NoBrainer's environment, else the store of this machine, which needs no server.
module NBLock
  @config = Config.new.freeze
  @clients = {}
  @last_used = nil
  @opening = Exclusion.new

  class << self
    # The configuration, to be read. NBLock.configure changes it.
    attr_reader :config

    # Yields the configuration, to be changed. Locks that are held stay where they are; every lock
    # asks the new store from its next grant on.
    #
    # Raises ArgumentError, and changes nothing, when a value is wrong.
    def configure
      changed = @config.dup
      yield changed
      @config = changed.freeze
      nil
    end

    # Closes every store that is open: holds that are renewed are released, plain leases run out,
    # waiters of this process get LockInvalidOp. The next use of a lock opens a store anew.
    #
    # Waits for the store to take the releases, op_timeout at most; other threads wait meanwhile.
    # Raises StoreError when that was not long enough: what is left runs out with its lease. Raises
    # LockInvalidOp in a signal handler, which has to leave it to a thread.
    def close
      clients = @opening.synchronize { @clients.values.tap { @clients, @last_used = {}, nil } }
      clients.map(&:close).compact.each { |error| raise error }
      nil
    end

    # The store that the configuration names at this moment, opened when it is not yet.
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
      # Two threads may both have opened it: the first one's is kept.
      @opening.synchronize { @clients[settings] ||= opened }
    end
  end
end
