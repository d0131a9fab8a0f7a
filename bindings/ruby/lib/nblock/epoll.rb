# frozen_string_literal: true

require "ffi"

module NBLock
  # Linux's epoll, edge-triggered: it reports each time a descriptor becomes readable, and nothing while it stays
  # readable.
  class Epoll # :nodoc:
    # The system's functions.
    module System
      extend FFI::Library
      ffi_lib FFI::Library::LIBC
      attach_function :epoll_create1, [:int], :int
      attach_function :epoll_ctl, %i[int int int pointer], :int
      attach_function :epoll_wait, %i[int pointer int int], :int
    end

    # epoll.h
    CLOEXEC = 0o2000000
    ADD = 1
    DEL = 2
    IN_EDGES = 0x8000_0001
    # struct epoll_event is packed on this one kind of machine.
    DATA_AT = FFI::Platform::ARCH.match?(/x86_64/) ? 4 : 8
    SIZE = DATA_AT + 8
    MOST = 64
    private_constant :System, :CLOEXEC, :ADD, :DEL, :IN_EDGES, :DATA_AT, :SIZE, :MOST

    def initialize
      @io = IO.for_fd(checked(System.epoll_create1(CLOEXEC)))
      @events = FFI::MemoryPointer.new(:char, SIZE * MOST)
    end

    # Watches an IO; number is what wait returns for it.
    def add(io, number)
      event = FFI::MemoryPointer.new(:char, SIZE)
      event.put_uint32(0, IN_EDGES)
      event.put_uint64(DATA_AT, number)
      checked(System.epoll_ctl(@io.fileno, ADD, io.fileno, event))
    end

    def remove(io)
      System.epoll_ctl(@io.fileno, DEL, io.fileno, nil)
    end

    # Waits; other threads run meanwhile. Returns the numbers of the IOs that became readable.
    def wait
      @io.wait_readable
      count = checked(System.epoll_wait(@io.fileno, @events, MOST, 0))
      Array.new(count) { |index| @events.get_uint64(index * SIZE + DATA_AT) }
    end

    private

    def checked(result)
      return result unless result.negative?

      raise Error::StoreError.new("the loss of a hold cannot be watched: #{SystemCallError.new(nil, FFI.errno).message}",
                                  status: :resources)
    end
  end
end
