# frozen_string_literal: true

require "ffi"

module NBLock
  # libnblock itself: every native function that this gem calls, as nblock.h declares it.
  #
  # Functions keep their C names without the prefix. They are called while Ruby's global lock is held, because none of
  # them waits: a call that may wait is started as an operation, and Ruby waits for it (see Operation). Only
  # client_close and op_wait wait, and let other threads run meanwhile.
  module Library # :nodoc:
    extend FFI::Library

    # The version of the interface that is declared below (nblock.h: NBL_ABI_VERSION). Newer libraries with the same
    # soname have all of it.
    ABI_VERSION = 1

    # Only NBLOCK_LIBRARY if it is set; otherwise the gem's own copy, then the system's library.
    PLACES =
      if ENV["NBLOCK_LIBRARY"].to_s.empty?
        [File.expand_path("libnblock.so", __dir__), "libnblock.so.0"].freeze
      else
        [ENV.fetch("NBLOCK_LIBRARY")].freeze
      end

    # nblock.h: nbl_status_t.
    OK = 0
    UNAVAILABLE = 1
    LOST = 2
    NOT_FOUND = 3
    PENDING = 4
    CANCELLED = 5
    INVALID_OP = -1
    INVALID_ARGUMENT = -2
    BAD_HANDLE = -3
    UNREACHABLE = -4
    INDETERMINATE = -5
    DENIED = -6
    STORE = -7
    FORKED = -8
    INTERNAL = -9
    RESOURCES = -10
    BUFFER_TOO_SMALL = -11

    # nblock.h: nbl_lock_state_t.
    STATE_IDLE = 1
    STATE_PENDING = 2
    STATE_HELD = 3
    STATE_OVERDUE = 4
    STATE_LOST = 5
    STATE_FORKED = 6

    # nblock.h: NBL_NO_WAIT, NBL_FOREVER, NBL_ON, NBL_OFF.
    NO_WAIT = -2
    FOREVER = -1
    ON = 1
    OFF = -1

    # nblock.h: NBL_LIST_...
    LIST_ALL = 1
    LIST_EXPIRED = 2

    # nblock.h: NBL_TEXT_...
    TEXT_INSTANCE_TOKEN = 3

    # nbl_error_t.
    class ErrorStruct < FFI::Struct
      layout :struct_size, :uint32, :status, :int32, :message, [:char, 1024]
    end

    # nbl_client_options_t.
    class ClientOptions < FFI::Struct
      layout :struct_size, :uint32, :reserved, :uint32, :expire_ms, :int64, :timeout_ms, :int64,
             :op_timeout_ms, :int64, :connect_timeout_ms, :int64, :app, :pointer
    end

    # nbl_lock_options_t.
    class LockOptions < FFI::Struct
      layout :struct_size, :uint32, :auto_refresh, :int32, :expire_ms, :int64, :timeout_ms, :int64,
             :if_held, :int32, :fence, :int32
    end

    # nbl_list_options_t.
    class ListOptions < FFI::Struct
      layout :struct_size, :uint32, :filter, :int32
    end

    # nbl_ping_t.
    class PingStruct < FFI::Struct
      layout :struct_size, :uint32, :skew_measured, :uint32, :skew_ms, :int64, :round_trip_us, :uint64,
             :server, [:char, 256], :location, [:char, 512], :caveats, [:char, 1024]
    end

    # nbl_record_t.
    class RecordStruct < FFI::Struct
      layout :struct_size, :uint32, :pid, :uint32, :remaining_ms, :int64, :expires_at_ms, :uint64,
             :acquired_at_ms, :uint64, :fence, :uint64, :lock_count, :uint32, :expired, :uint32,
             :key, :pointer, :key_len, :size_t, :key_hash, :pointer, :host, :pointer, :boot_id, :pointer,
             :app, :pointer, :version, :pointer, :damaged, :pointer,
             :foreign, :uint32, :reserved, :uint32
    end

    # nbl_client_t *, nbl_lock_t *, nbl_op_t * and nbl_list_t * are ids of a pointer's size, not addresses: as integers
    # they need no Ruby object.
    typedef :ulong, :handle

    class << self
      private

      def load_first
        failures = PLACES.map do |place|
          ffi_lib_flags :now, :local
          ffi_lib place
          return place
        rescue LoadError => e
          "  #{place}: #{e.message.lines.first&.strip}"
        end
        raise LoadError, "libnblock was not found. Looked at:\n#{failures.join("\n")}\n" \
                         "Set NBLOCK_LIBRARY to the path of libnblock.so, or build the gem with bindings/ruby/build.sh."
      end

      def check_abi
        found = abi_version
        return if found >= ABI_VERSION

        raise LoadError, "#{PATH} has version #{found} of nblock's interface, and this gem needs #{ABI_VERSION} " \
                         "or later: install a newer libnblock, or set NBLOCK_LIBRARY to the path of one."
      end
    end

    # Where the library was found.
    PATH = load_first

    begin
      attach_function :abi_version, :nbl_abi_version, [], :uint32
    rescue FFI::NotFoundError
      raise LoadError, "#{PATH} is not libnblock: set NBLOCK_LIBRARY to the path of libnblock.so."
    end
    check_abi

    # Clients. client_new_start: url, options, out (operation), error.
    attach_function :client_new_start, :nbl_client_new_start, %i[string pointer pointer pointer], :int32
    attach_function :client_ping_start, :nbl_client_ping_start, %i[handle pointer pointer], :int32
    attach_function :client_close, :nbl_client_close, %i[handle int64 pointer], :int32, blocking: true
    attach_function :client_free, :nbl_client_free, %i[handle], :int32

    # Locks. lock_new: client, key, its length, defaults, out (lock), error. reentrant_lock_new: likewise,
    # with the owner token before the defaults.
    attach_function :lock_new, :nbl_lock_new, %i[handle pointer size_t pointer pointer pointer], :int32
    attach_function :reentrant_lock_new, :nbl_reentrant_lock_new,
                    %i[handle pointer size_t string pointer pointer pointer], :int32
    attach_function :lock_free, :nbl_lock_free, %i[handle], :int32
    attach_function :lock_state, :nbl_lock_state, %i[handle pointer pointer], :int32
    attach_function :lock_remaining_ms, :nbl_lock_remaining_ms, %i[handle pointer pointer], :int32
    attach_function :lock_expires_at_ms, :nbl_lock_expires_at_ms, %i[handle pointer pointer], :int32
    attach_function :lock_lost_fd, :nbl_lock_lost_fd, %i[handle], :int32
    attach_function :lock_text, :nbl_lock_text, %i[handle int32 pointer size_t pointer pointer], :int32

    # Functions that start an operation, which is written to out. lock_start and refresh_start: lock, options, out,
    # error.
    attach_function :lock_start, :nbl_lock_start, %i[handle pointer pointer pointer], :int32
    attach_function :unlock_start, :nbl_unlock_start, %i[handle pointer pointer], :int32
    attach_function :refresh_start, :nbl_refresh_start, %i[handle pointer pointer pointer], :int32
    attach_function :lock_fence_start, :nbl_lock_fence_start, %i[handle pointer pointer], :int32
    attach_function :list_start, :nbl_list_start, %i[handle pointer pointer pointer], :int32
    attach_function :find_start, :nbl_find_start, %i[handle pointer size_t pointer pointer], :int32
    attach_function :break_start, :nbl_break_start, %i[handle size_t pointer pointer], :int32

    # Operations.
    attach_function :op_fd, :nbl_op_fd, %i[handle], :int32
    attach_function :op_wait, :nbl_op_wait, %i[handle int64 pointer], :int32, blocking: true
    attach_function :op_finish, :nbl_op_finish, %i[handle pointer], :int32
    attach_function :op_cancel, :nbl_op_cancel, %i[handle], :int32
    attach_function :op_free, :nbl_op_free, %i[handle], :int32
    attach_function :op_take_client, :nbl_op_take_client, %i[handle pointer pointer], :int32
    attach_function :op_take_list, :nbl_op_take_list, %i[handle pointer pointer], :int32
    attach_function :op_take_ping, :nbl_op_take_ping, %i[handle pointer pointer], :int32
    attach_function :op_take_fence, :nbl_op_take_fence, %i[handle pointer pointer], :int32

    # Lists of records.
    attach_function :list_length, :nbl_list_length, %i[handle pointer pointer], :int32
    attach_function :list_record, :nbl_list_record, %i[handle size_t pointer pointer], :int32
    attach_function :list_free, :nbl_list_free, %i[handle], :int32
  end
end
