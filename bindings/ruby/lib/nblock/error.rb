# frozen_string_literal: true

module NBLock
  # What goes wrong, beside ArgumentError. The names are NoBrainer's where it has them; with
  # "nblock/nobrainer" loaded, those are also subclasses of NoBrainer's.
  module Error
    # Somebody else held the lock for as long as was waited.
    class LockUnavailable < RuntimeError; end

    # The hold ended without our unlock: its lease ran out and another took over, or it was broken.
    class LostLock < RuntimeError; end

    # The call does not fit the lock's state: already locked, not locked, store closed.
    class LockInvalidOp < RuntimeError; end

    # Lock.find found nothing.
    class DocumentNotFound < RuntimeError; end

    # The hold belongs to the process that this one was forked from.
    class Forked < RuntimeError; end

    # The store could not do it, or did not answer.
    class StoreError < RuntimeError
      # :unreachable, :indeterminate (no answer came: it may or may not have been done), :denied,
      # :store, :resources or :internal.
      attr_reader :reason

      def initialize(message = nil, reason: :store)
        super(message)
        @reason = reason
      end
    end

    # nblock.h: NBL_ERR_...
    REASONS = {
      -4 => :unreachable, -5 => :indeterminate, -6 => :denied, -7 => :store, -9 => :internal, -10 => :resources
    }.freeze
    private_constant :REASONS

    # The exception for a status of the library (nblock.h: NBL_...).
    def self.for(status, message) # :nodoc:
      case status
      when 1 then LockUnavailable.new(message)
      when 2 then LostLock.new(message)
      when 3 then DocumentNotFound.new(message)
      # Cancelled: the client was closed while a thread waited. A bad handle: likewise, and freed.
      when 5, -1, -3 then LockInvalidOp.new(message)
      when -2 then ArgumentError.new(message)
      when -8 then Forked.new(message)
      else StoreError.new(message, reason: REASONS.fetch(status, :internal))
      end
    end
  end
end
