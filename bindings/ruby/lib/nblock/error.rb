# frozen_string_literal: true

module NBLock
  # The errors, in addition to ArgumentError. They have NoBrainer's names if it has such an error; when
  # "nblock/nobrainer" is loaded, those are also subclasses of NoBrainer's. All include NBLock::Error, so that
  # `rescue NBLock::Error` catches them all.
  module Error
    # The part of LockUnavailable that its NoBrainer variant has too.
    module NamesHolder
      # The holder's Record, as the store had it then; nil if the store did not report it.
      attr_reader :holder

      attr_writer :holder # :nodoc:
    end

    # Another holder had the lock for as long as the call waited. The message names the holder, and says so if
    # that is this thread, this process, or a parent of it.
    class LockUnavailable < RuntimeError
      include Error
      include NamesHolder
    end

    # The hold ended without our unlock: its lease ran out and another holder took it over, or it was broken.
    class LostLock < RuntimeError
      include Error
    end

    # The call does not fit the lock's state: already locked, not locked, store closed.
    class LockInvalidOp < RuntimeError
      include Error
    end

    # Lock.find found no record.
    class DocumentNotFound < RuntimeError
      include Error
    end

    # The hold belongs to the process that this one was forked from.
    class Forked < RuntimeError
      include Error
    end

    # The store failed, refused, or did not reply.
    class StoreError < RuntimeError
      include Error

      # :unreachable (nothing was applied), :indeterminate (no reply: the request may or may not have been
      # applied), :denied, :store, :resources or :internal.
      attr_reader :status

      def initialize(message = nil, status: :store)
        super(message)
        @status = status
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
      else StoreError.new(message, status: STORE_STATUSES.fetch(status, :internal))
      end
    end

    STORE_STATUSES = {
      Library::UNREACHABLE => :unreachable, Library::INDETERMINATE => :indeterminate, Library::DENIED => :denied,
      Library::STORE => :store, Library::INTERNAL => :internal, Library::RESOURCES => :resources
    }.freeze
    private_constant :STORE_STATUSES
  end
end
