# frozen_string_literal: true

require "nblock/handle"

module NBLock
  # An open store.
  class Client # :nodoc:
    # Opens the store. Waits at most connect_timeout; other threads and fibers run meanwhile.
    def initialize(settings)
      url, app_name, op_timeout, connect_timeout = settings
      app = app_name && FFI::MemoryPointer.from_string(app_name)
      options = Library::ClientOptions.new
      options[:struct_size] = Library::ClientOptions.size
      options[:op_timeout_ms] = Options.limit(op_timeout, "op_timeout") || 0
      options[:connect_timeout_ms] = Options.limit(connect_timeout, "connect_timeout") || 0
      options[:app] = app
      error = Operation.run(method(:take)) { |out, err| Library.client_new_start(url, options, out, err) }
      raise error if error
    end

    def id
      @handle.id
    end

    # Whether it was closed: its locks can no longer be used.
    def closed?
      @closed
    end

    # Closes the store. Waits at most op_timeout. Returns nil, or the error.
    def close
      @closed = true
      answer = Operation::Answer.new
      status = Library.client_close(id, 0, answer.error)
      answer.exception(status) unless status == Library::OK
    end

    private

    def take(operation)
      answer = Operation::Answer.new
      status = Library.op_take_client(operation, answer.out, answer.error)
      @handle ||= Handle.new(answer.handle, :client_free) if status == Library::OK
    end
  end
end
