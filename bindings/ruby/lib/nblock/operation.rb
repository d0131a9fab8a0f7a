# frozen_string_literal: true

require "io/wait"

module NBLock
  # Calls of the library, and waiting for them.
  module Operation # :nodoc:
    # Thread#raise, Thread#kill and Timeout wait until the block that runs under this is done. (Signal handlers,
    # including Ctrl-C, do not: Ruby cannot defer them.)
    UNINTERRUPTED = { Object => :never }.freeze

    # For how long a thread first waits in the library, in milliseconds. It reads the reply of a server itself there,
    # so that no other thread has to be woken, and needs no descriptor. Nothing interrupts it meanwhile.
    AT_FIRST = 10

    # The memory that a call writes to: an out-parameter and an error.
    class Answer
      @spare = []

      class << self
        # A spare one, or a new one, because allocating native memory costs most here. Each is used by one call at a
        # time, from any thread, fiber or signal handler.
        def take
          @spare.pop || new
        end

        def leave(answer)
          answer.clear
          @spare.push(answer)
        end
      end

      # The out-parameter, eight bytes.
      attr_reader :out
      # A pointer to an nbl_error_t.
      attr_reader :error

      def initialize
        @out = FFI::MemoryPointer.new(:char, 8 + Library::ErrorStruct.size)
        @error = @out + 8
        @error.put_uint32(0, Library::ErrorStruct.size)
      end

      # The value that was written to the out-parameter, 0 if none was.
      def handle
        @out.get_uint64(0)
      end

      def clear
        @out.put_uint64(0, 0)
      end

      def exception(status)
        message = @error.get_string(Library::ErrorStruct.offset_of(:message))
        Error.for(status, message.force_encoding(Encoding::UTF_8).scrub)
      end
    end

    class << self
      # Runs an operation to its end. Returns nil on success, otherwise the exception to raise.
      #
      # The block gets (out, error), calls a function that starts an operation, and returns its status; or returns nil
      # if there is nothing to do. Nothing can interrupt between the call of this method and the end of the block.
      # taken.(operation) is called as soon as the operation has succeeded, even if an interruption then prevents this
      # method from returning; it must not raise, and may be called twice.
      #
      # Other threads and fibers run while this waits. The wait can be interrupted at any moment, but for AT_FIRST: then
      # the operation is cancelled, and an acquire leaves nothing in the store (R14). If `within` is given, the wait ends
      # after that many seconds with a StoreError.
      def run(taken = nil, within: nil)
        # Ruby checks for interruptions whenever a method written in C returns, so that every call except this one
        # would allow them here.
        answer = status = nil
        Thread.handle_interrupt(UNINTERRUPTED) do
          answer = Answer.take
          status = yield answer.out, answer.error
          status = look(answer, taken) if status == Library::OK
          if status == Library::PENDING && !shares_thread?
            Library.op_wait(answer.handle, AT_FIRST, nil)
            status = look(answer, taken)
          end
        end
        limit = within && now + within
        while status == Library::PENDING
          # The operation is given up below.
          return late(within) if limit && now > limit

          wait(answer.handle, limit)
          Thread.handle_interrupt(UNINTERRUPTED) { status = look(answer, taken) }
        end
        error = answer.exception(status) unless status.nil? || status == Library::OK
        # An interruption may come at any point here, and must not touch memory that others may already be using.
        spare = answer
        answer = nil
        Answer.leave(spare)
        error
      ensure
        give_up(answer, taken)
      end

      # Calls a function that does not wait, with (out, error), and returns the value that it wrote to out, a number of
      # eight bytes unless `read` says otherwise. Raises the error that it reports.
      def call(read = :get_uint64)
        answer = Answer.take
        status = yield answer.out, answer.error
        raise answer.exception(status) unless status == Library::OK

        written = answer.out.public_send(read, 0)
        Answer.leave(answer)
        written
      end

      # The state of a lock of the library: Library::STATE_...
      def state(id)
        call(:get_int32) { |out, error| Library.lock_state(id, out, error) }
      end

      # A text from the library. The first call gets its size, which the text may have outgrown by the next one.
      def text(function, *arguments)
        size = call { |out, error| Library.public_send(function, *arguments, nil, 0, out, error) }
        loop do
          buffer = FFI::MemoryPointer.new(:char, size)
          answer = Answer.take
          status = Library.public_send(function, *arguments, buffer, size, answer.out, answer.error)
          size = answer.handle
          error = answer.exception(status) unless [Library::OK, Library::BUFFER_TOO_SMALL].include?(status)
          Answer.leave(answer)
          raise error if error
          return buffer.get_bytes(0, size - 1).force_encoding(Encoding::UTF_8) if status == Library::OK
        end
      end

      private

      # If the operation has ended, keeps its result and frees it. Returns its status.
      def look(answer, taken)
        operation = answer.handle
        status = Library.op_finish(operation, answer.error)
        return status if status == Library::PENDING

        taken&.call(operation) if status == Library::OK
        Library.op_free(operation)
        status
      end

      # Whether other fibers run in this thread while this one waits for a descriptor.
      def shares_thread?
        !(Fiber.respond_to?(:current_scheduler) ? Fiber.current_scheduler : Fiber.scheduler).nil?
      end

      def now
        Process.clock_gettime(Process::CLOCK_MONOTONIC)
      end

      def late(within)
        Error::StoreError.new("no answer from the store within #{within} s", status: :indeterminate)
      end

      def wait(operation, limit)
        descriptor = Library.op_fd(operation)
        if descriptor.negative?
          raise Error::StoreError.new("no file descriptor could be created for a waiting operation", status: :resources)
        end

        # The descriptor is the library's, which closes it.
        io = IO.for_fd(descriptor, autoclose: false)
        limit ? io.wait_readable([limit - now, 0].max) : io.wait_readable
      end

      # Ends an operation that an exception has interrupted at any point (then there is an answer). A handle that was
      # never made, or is already freed, does no harm.
      def give_up(answer, taken)
        Thread.handle_interrupt(UNINTERRUPTED) do
          next unless answer

          operation = answer.handle
          Library.op_cancel(operation)
          # Its success was already reported, and only keeping the result was interrupted.
          taken&.call(operation) if Library.op_finish(operation, nil) == Library::OK
          Library.op_free(operation)
        end
      end
    end
  end
end
