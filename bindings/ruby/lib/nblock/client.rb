# frozen_string_literal: true

require "nblock/handle"

module NBLock
  # What NBLock.ping found out about the store.
  #
  # server:: the name, version and address of the server that replied
  # location:: where the store is, for people to read; contains no password
  # round_trip:: how many seconds the reply took
  # skew:: how many seconds the server's clock is ahead of this machine's; nil if it is the same clock, or was not
  #        measured
  # caveats:: warnings, an Array of String: what in the server's configuration endangers locks, and what to do about it
  Ping = Struct.new(:server, :location, :round_trip, :skew, :caveats, keyword_init: true) do
    # Of an nbl_ping_t.
    def self.of(facts) # :nodoc:
      text = ->(field) { facts[field].to_s.force_encoding(Encoding::UTF_8) }
      new(server: text.(:server), location: text.(:location), round_trip: facts[:round_trip_us] / 1e6,
          skew: (facts[:skew_ms] / 1e3 unless facts[:skew_measured].zero?),
          caveats: text.(:caveats).lines(chomp: true)).freeze
    end
  end

  # An open store.
  class Client # :nodoc:
    # Opens the store. Waits at most connect_timeout; other threads and fibers run meanwhile.
    def initialize(settings)
      url, app_name, op_timeout, connect_timeout = settings
      app = FFI::MemoryPointer.from_string(app_name || Client.program_name)
      options = Library::ClientOptions.new
      options[:struct_size] = Library::ClientOptions.size
      options[:op_timeout_ms] = Options.limit(op_timeout, "op_timeout") || 0
      options[:connect_timeout_ms] = Options.limit(connect_timeout, "connect_timeout") || 0
      options[:app] = app
      error = Operation.run(method(:take)) { |out, err| Library.client_new_start(url, options, out, err) }
      raise error if error
    end

    # The name of the script that was started, at most 255 bytes. Not $PROGRAM_NAME, in which servers show what they do.
    def self.program_name
      name = File.basename(Process.argv0)
      name = "ruby" if ["", "-", "-e"].include?(name)
      name.encode(Encoding::UTF_8, invalid: :replace, undef: :replace).scrub.byteslice(0, 255).scrub("")
    end

    def id
      @handle.id
    end

    # Whether it was closed: its locks can no longer be used.
    def closed?
      @closed
    end

    # A Ping. Waits at most op_timeout; other threads and fibers run meanwhile. Raises StoreError.
    def ping
      facts = Library::PingStruct.new
      facts[:struct_size] = Library::PingStruct.size
      note = ->(operation) { Library.op_take_ping(operation, facts, nil) }
      error = Operation.run(note) { |out, err| Library.client_ping_start(id, out, err) }
      error ? raise(error) : Ping.of(facts)
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
