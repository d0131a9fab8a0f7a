# frozen_string_literal: true

require "weakref"

module NBLock
  # Waits for the loss of holds whose locks have an on_lost block: one thread for all of them.
  class LossWatcher # :nodoc:
    # A lock that is watched: a descriptor of our own, and the lock, which may be collected.
    Watched = Struct.new(:io, :lock, :told)
    private_constant :Watched

    @making = Mutex.new

    class << self
      # Watches a lock from now on, in this process; tells of the next loss, if one was told of before.
      def watch(lock)
        current.watch(lock)
      end

      private

      def current
        @making.synchronize do
          @current = new unless @current&.alive?
          @current
        end
      end
    end

    def initialize
      @pid = Process.pid
      @changes = Mutex.new
      @watched = {}
      @wake_reader, @wake_writer = IO.pipe
      @thread = Thread.new { run }
      @thread.name = "nblock on_lost"
    end

    # Whether this process has the thread: a forked child needs its own.
    def alive?
      @pid == Process.pid && @thread.alive?
    end

    def watch(lock)
      native = lock.native
      known = @watched[native.id]
      return if known && !known.told

      @changes.synchronize do
        if known
          known.told = false
        else
          descriptor = lock.lost_descriptor
          raise Error::StoreError.new("no descriptor could be made", reason: :resources) if descriptor.negative?

          # Our own: the library closes its descriptor with the lock.
          io = IO.for_fd(descriptor, autoclose: false).dup
          io.autoclose = true
          @watched[native.id] = Watched.new(io, WeakRef.new(lock), false)
        end
      end
      @wake_writer.write_nonblock("!", exception: false)
    end

    private

    def run
      loop do
        readable, = IO.select([@wake_reader, *waiting.map(&:io)])
        @wake_reader.read_nonblock(4096, exception: false) if readable.include?(@wake_reader)
        waiting.each { |watched| look(watched) if readable.include?(watched.io) }
      end
    end

    # What is not told of yet. What was collected is forgotten.
    def waiting
      @changes.synchronize do
        @watched.delete_if { |_, watched| !watched.lock.weakref_alive? && watched.io.close.nil? }
        @watched.values.reject(&:told)
      end
    end

    def look(watched)
      lock = watched.lock.__getobj__
      # It may have been unlocked since.
      return unless lock.lost?

      watched.told = true
      # A thread for each: one block that takes long delays no other.
      Thread.new { lock.tell_lost }.name = "nblock on_lost #{lock.key}"
    rescue WeakRef::RefError
      nil
    end
  end
end
