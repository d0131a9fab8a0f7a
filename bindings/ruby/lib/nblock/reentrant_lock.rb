# frozen_string_literal: true

require "securerandom"

module NBLock
  # A lock that its owner may take again while it is held; a drop-in for NoBrainer::ReentrantLock.
  #
  # All objects with the same instance_token are one owner, also in other processes. The record counts how many times
  # the lock is taken; the last unlock deletes it, and any object with the token may unlock.
  class ReentrantLock < Lock
    # Whether a record is of a lock of this class.
    def self.of?(record) # :nodoc:
      record.reentrant?
    end

    def self.found(record) # :nodoc:
      new(record.key).tap { |lock| lock.record = record }
    end

    # As Lock.new, and:
    #
    # instance_token:: the owner of the holds, a String of 1 to 255 bytes of UTF-8. nil means that only this object
    #                  in this process is the owner (a forked child is another owner)
    def initialize(key, options = {})
      Options.allow(options, "#{self.class}.new", :expire, :timeout, :auto_refresh, :instance_token)
      super(key, options.reject { |name, _| name == :instance_token })
      token = options[:instance_token]
      @given_token = token && Options.owner_token(token)
    end

    # The owner of this object's holds, a String.
    def instance_token
      return @given_token if @given_token

      pid, token = @drawn_token
      return token if pid == Process.pid

      SecureRandom.hex(16).tap { |fresh| @drawn_token = [Process.pid, fresh.freeze].freeze }
    end

    private

    def for_grant
      # A random token from before a fork would make parent and child one owner.
      @native = nil if @given_token.nil? && @drawn_token && @drawn_token.first != Process.pid
      super
    end

    # Any object with the owner token may unlock and refresh, whether it has locked or not.
    def in_use
      @native || for_grant
    end

    def new_handle(client_id, text, size, out, error)
      Library.reentrant_lock_new(client_id, text, size, instance_token, nil, out, error)
    end
  end
end
