# frozen_string_literal: true

module NBLock
  # What goes wrong, beside ArgumentError. The names are NoBrainer's where it has them; with
  # "nblock/nobrainer" loaded, those are also subclasses of NoBrainer's. Every one is an NBLock::Error, and so
  # `rescue NBLock::Error` catches them all.
  module Error
    # What LockUnavailable has, be it NoBrainer's subclass.
    module NamesHolder
      # The holder's Record, as the store had it then; nil when the store did not say.
      attr_reader :holder

      attr_writer :holder # :nodoc:
    end

    # Somebody else held the lock for as long as was waited. The message names the holder, and says when that
    # is this very thread, this process, or a parent of it.
    class LockUnavailable < RuntimeError
      include Error
      include NamesHolder
    end

    # The hold ended without our unlock: its lease ran out and another took over, or it was broken.
    class LostLock < RuntimeError
      include Error
    end

    # The call does not fit the lock's state: already locked, not locked, store closed.
    class LockInvalidOp < RuntimeError
      include Error
    end

    # Lock.find found nothing.
    class DocumentNotFound < RuntimeError
      include Error
    end

    # The hold belongs to the process that this one was forked from.
    class Forked < RuntimeError
      include Error
    end

    # The store could not do it, or did not answer.
    class StoreError < RuntimeError
      include Error

      # :unreachable, :indeterminate (no answer came: it may or may not have been done), :denied,
      # :store, :resources or :internal.
      attr_reader :reason

      def initialize(message = nil, reason: :store)
        super(message)
        @reason = reason
      end
    end

    # The exception for a status of the library.
    def self.for(status, message) # :nodoc:
      case status
      when Library::UNAVAILABLE then LockUnavailable.new(message)
      when Library::LOST then LostLock.new(message)
      when Library::NOT_FOUND then DocumentNotFound.new(message)
      # Cancelled: the client was closed while a thread waited.
      when Library::CANCELLED, Library::INVALID_OP, Library::BAD_HANDLE then LockInvalidOp.new(message)
      when Library::INVALID_ARGUMENT then ArgumentError.new(message)
      when Library::FORKED then Forked.new(message)
      else StoreError.new(message, reason: REASONS.fetch(status, :internal))
      end
    end

    REASONS = {
      Library::UNREACHABLE => :unreachable, Library::INDETERMINATE => :indeterminate, Library::DENIED => :denied,
      Library::STORE => :store, Library::INTERNAL => :internal, Library::RESOURCES => :resources
    }.freeze
    private_constant :REASONS
  end
end
