# frozen_string_literal: true

require "fiber"

module NBLock
  # Finds the holder of a lock that was not granted, for the error.
  module Holder # :nodoc:
    # How long finding the holder may take, in seconds, beyond the timeout of the lock.
    LIMIT = 0.25

    # A lock object that was granted: its handle, its key, and which fiber took it last.
    Grant = Struct.new(:id, :key, :fiber)
    private_constant :Grant

    @grants = {}

    class << self
      # Records that this fiber was granted the lock of a handle.
      def note(id, key)
        (@grants[id] ||= Grant.new(id, key)).fiber = Fiber.current.object_id
      end

      # The finalizer of a handle: forgets its grant.
      def forgetting(id)
        ->(_) { @grants.delete(id) }
      end

      # The error for a lock that was not granted; it names the holder if the store reports it soon enough.
      def named(error, lock, client)
        return error unless error.is_a?(Error::LockUnavailable)

        record = find(client, lock.key)
        return error if record.nil? || record.expired?

        key = Options.show(lock.key)
        Error::LockUnavailable.new("lock on #{key} unavailable: #{describe(record)}").tap { |named| named.holder = record }
      end

      private

      def find(client, key)
        RecordList.find(client, key, within: LIMIT)[0]
      rescue Error
        nil
      end

      def describe(record)
        who = [record.host && printable(record.host), record.pid].compact.join(":")
        who = [who.empty? ? "somebody else" : who, record.app && printable(record.app)].compact.join(" ")
        relation = relation(record)
        left = record.remaining.infinite? ? "with no end" : "#{format("%.1f", record.remaining)} s left"
        "held by #{who}#{" (#{relation})" if relation}, #{left}"
      end

      # The holder's relation to this thread, if it is known: waiting for such a holder may never end. A process id is
      # only valid on its own machine, and in its own container, which has a host name of its own.
      def relation(record)
        return unless record.pid && record.boot_id == kernel("random/boot_id") && record.host == kernel("hostname")
        return mine?(record.key) ? "this thread" : "this process" if record.pid == Process.pid
        return unless ancestor?(record.pid)
        return "a parent of this process" unless ENV["NBLOCK_KEY"] == record.key

        "the `nblock run` that started this program, see NBLOCK_KEY"
      end

      # Whether this fiber has a lock object that holds the key.
      def mine?(key)
        here = Fiber.current.object_id
        # A copy: other threads add to it.
        @grants.values.any? { |grant| grant.key == key && grant.fiber == here && holds?(grant.id) }
      end

      # The handle may be freed meanwhile, by a finalizer.
      def holds?(id)
        [Library::STATE_HELD, Library::STATE_OVERDUE].include?(Operation.state(id))
      rescue Error
        false
      end

      def ancestor?(pid)
        process = Process.pid
        while process > 1
          # The name in parentheses may hold anything.
          process = File.binread("/proc/#{process}/stat").rpartition(")").last.split[1].to_i
          return true if process == pid
        end
        false
      rescue SystemCallError
        false
      end

      def kernel(name)
        File.read("/proc/sys/kernel/#{name}").strip
      rescue SystemCallError
        nil
      end

      # Text from another program, made safe for a message.
      def printable(text)
        shown = text[0, 40].inspect[1..-2]
        text.length > 40 ? "#{shown}..." : shown
      end
    end
  end
end
