# frozen_string_literal: true

require "weakref"
require "nblock/epoll"
require "nblock/exclusion"

module NBLock
  # Waits for the loss of holds whose locks have an on_lost block: one thread for all of them.
  class LossWatcher # :nodoc:
    # A lock that is watched: a descriptor of our own, and the lock, which may be collected.
    Watched = Struct.new(:io, :lock)
    private_constant :Watched

    @making = Exclusion.new

    class << self
      # Watches a lock from now on, in this process.
      def watch(lock)
        current.watch(lock)
      end

      private

      def current
        return @current if @current&.alive?

        @making.synchronize do
          @current = new unless @current&.alive?
          @current
        end
      end
    end

    def initialize
      @pid = Process.pid
      @changes = Exclusion.new
      @watched = {}
      @collect_at = 16
      @epoll = Epoll.new
      @thread = Thread.new { run }
      @thread.name = "nblock on_lost"
    end

    # Whether this process has the thread: a forked child needs its own.
    def alive?
      @pid == Process.pid && @thread.alive?
    end

    def watch(lock)
      id = lock.native.id
      return if @watched[id]

      @changes.synchronize { @watched[id] ||= add(lock, id) }
    end

    private

    def add(lock, id)
      collect if @watched.size >= @collect_at
      descriptor = lock.lost_descriptor
      if descriptor.negative?
        raise Error::StoreError.new("no file descriptor could be created to watch a hold", status: :resources)
      end

      # Our own: the library closes its descriptor with the lock.
      io = IO.for_fd(descriptor, autoclose: false).dup
      io.autoclose = true
      @epoll.add(io, id)
      Watched.new(io, WeakRef.new(lock))
    end

    # Forgets the locks that are gone.
    def collect
      @watched.delete_if do |_, watched|
        next if watched.lock.weakref_alive?

        @epoll.remove(watched.io)
        watched.io.close
        true
      end
      @collect_at = [16, @watched.size * 2].max
    end

    def run
      loop { @epoll.wait.each { |id| look(id) } }
    end

    # The hold of a lock has become overdue or lost. Called once each time.
    def look(id)
      lock = @watched[id]&.lock&.__getobj__
      # It may have been unlocked since, or recovered.
      return unless lock&.lost?

      # A thread for each: one block that takes long delays no other.
      Thread.new { lock.tell_lost }.name = "nblock on_lost #{lock.key}"
    rescue WeakRef::RefError
      nil
    end
  end
end
