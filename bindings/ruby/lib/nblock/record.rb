# frozen_string_literal: true

module NBLock
  # The record of a key, as it was read from the store. Fields about the holder are nil if the record does not contain
  # them: NoBrainer's records do not.
  #
  # key:: the key
  # expires_at:: Time at which the lease ends; nil if it has no end
  # remaining:: remaining seconds of the lease by the store's clock; if it has run out: minus the seconds since then; if
  #             it has no end: Float::INFINITY
  # host, pid, boot_id, app:: the holder: host name, process id, boot id of the machine, name of the program
  # acquired_at:: Time of the grant
  # fence:: the hold's fence, nil if it has none
  # lock_count:: how many times a reentrant lock is locked, nil for a plain lock
  # damaged:: what is wrong with a damaged record, nil if it is intact. A damaged record is never granted; its other
  #           fields may be nil, and its key may be a placeholder
  # version:: identifies exactly this state of the record: it changes with every renewal; reveals no token
  Record = Struct.new(:key, :expires_at, :remaining, :host, :pid, :boot_id, :app, :acquired_at, :fence,
                      :lock_count, :version, :damaged, keyword_init: true) do
    def initialize(expired: false, foreign: false, **facts)
      super(**facts)
      @expired = expired
      @foreign = foreign
    end

    # Whether the lease had run out, by the store's clock.
    def expired?
      @expired
    end

    # Whether nblock did not write the record: it is another library's lock or, in Redis, perhaps no lock at all, and
    # break does not delete it there.
    def foreign?
      @foreign
    end

    # Whether this is the record of a reentrant lock.
    def reentrant?
      !lock_count.nil?
    end

    # Breaks the lock by force: deletes the record if it is still exactly as it was read; and, if they are given, only
    # if it has this fence, this holder ("HOST:PID") and this version. Returns whether it was deleted. Then the
    # holder, if there is one, loses its hold, but may still be working. Asks the store. Raises StoreError, and
    # ArgumentError for a condition of another form.
    def break(if_fence: nil, if_owner: nil, if_version: nil)
      if if_fence && !if_fence.is_a?(Integer)
        raise ArgumentError, "if_fence must be an Integer (got #{if_fence.inspect})"
      end
      # A host name may have colons in it.
      if if_owner && !(if_owner.is_a?(String) && if_owner.match?(/\A.+:\d+\z/m))
        raise ArgumentError, "if_owner must be HOST:PID, of the record's host and pid (got #{if_owner.inspect})"
      end
      return false if if_fence && if_fence != fence
      return false if if_owner && if_owner != "#{host}:#{pid}"
      return false if if_version && if_version != version

      @list.break(@index)
    end

    def found_in(list, index) # :nodoc:
      @list = list
      @index = index
      freeze
    end
  end

  # A list of records of the library, as they were read.
  class RecordList # :nodoc:
    # Asks the store; other threads and fibers run meanwhile. filter: Library::LIST_...
    def self.fetch(client, filter)
      options = Library::ListOptions.new
      options[:struct_size] = Library::ListOptions.size
      options[:filter] = filter
      new { |out, error| Library.list_start(client.id, options, out, error) }
    end

    # Likewise, for one key. Raises DocumentNotFound, and StoreError after `within` seconds.
    def self.find(client, key, within: nil)
      text = FFI::MemoryPointer.new(:char, key.bytesize).put_bytes(0, key)
      new(within: within) { |out, error| Library.find_start(client.id, text, key.bytesize, out, error) }
    end

    # The block starts the operation that reads them.
    def initialize(within: nil, &start)
      error = Operation.run(method(:take), within: within, &start)
      raise error if error
    end

    def length
      @length ||= Operation.call { |out, error| Library.list_length(@handle.id, out, error) }
    end

    # The record at index, counted from 0.
    def [](index)
      facts = Library::RecordStruct.new
      facts[:struct_size] = Library::RecordStruct.size
      Operation.call { |_, error| Library.list_record(@handle.id, index, facts, error) }
      Record.new(
        key: utf8(facts[:key].get_bytes(0, facts[:key_len])).freeze,
        expired: facts[:expired] != 0, foreign: facts[:foreign] != 0,
        expires_at: time(facts[:expires_at_ms]), remaining: seconds(facts[:remaining_ms]),
        host: present(text(facts[:host])), pid: present(facts[:pid]),
        boot_id: present(text(facts[:boot_id])), app: present(text(facts[:app])),
        acquired_at: time(facts[:acquired_at_ms]), fence: present(facts[:fence]),
        lock_count: present(facts[:lock_count]), version: text(facts[:version]),
        damaged: present(text(facts[:damaged]))
      ).found_in(self, index)
    end

    # Deletes the record at index if it is still exactly as it was read. Returns whether it was deleted.
    def break(index)
      error = Operation.run { |out, err| Library.break_start(@handle.id, index, out, err) }
      return false if error.is_a?(Error::DocumentNotFound)

      error ? raise(error) : true
    end

    private

    def take(operation)
      answer = Operation::Answer.new
      status = Library.op_take_list(operation, answer.out, answer.error)
      @handle ||= Handle.new(answer.handle, :list_free) if status == Library::OK
    end

    # The library's texts are there as long as its list: copies.
    def text(pointer)
      utf8(pointer.get_string(0))
    end

    def utf8(bytes)
      bytes.force_encoding(Encoding::UTF_8)
    end

    # For what a record does not contain, the library has 0 or an empty text.
    def present(value)
      value unless value == 0 || value == ""
    end

    # The greatest number stands for a lease without an end.
    def seconds(milliseconds)
      milliseconds == (2**63) - 1 ? Float::INFINITY : milliseconds / 1000.0
    end

    def time(milliseconds)
      return if milliseconds.zero? || milliseconds == (2**64) - 1

      Time.at(milliseconds / 1000, milliseconds % 1000, :millisecond)
    end
  end

  # The locks that have a record in the store: Lock.all and Lock.expired return this. Each use asks the store again.
  class Scope
    include Enumerable

    def initialize(lock_class, filter) # :nodoc:
      @lock_class = lock_class
      @filter = filter
    end

    # Yields a lock object for every record, in no particular order. The object is idle, even if the key is locked, and
    # has the record. Raises StoreError.
    def each
      return enum_for(:each) unless block_given?

      each_record { |_, _, record| yield @lock_class.found(record) }
      self
    end

    def empty?
      none?
    end

    # Deletes the records, each one only if it has not changed since it was read just before. Their holders lose their
    # holds. Returns how many were deleted. Raises StoreError.
    def delete_all
      deleted = 0
      each_record { |list, index, _| deleted += 1 if list.break(index) }
      deleted
    end

    def inspect
      "#<#{self.class} #{@filter == Library::LIST_EXPIRED ? "expired" : "all"} of #{@lock_class}>"
    end

    private

    def each_record
      list = RecordList.fetch(NBLock.client, @filter)
      list.length.times do |index|
        record = list[index]
        yield list, index, record if @lock_class.of?(record)
      end
    end
  end
end
