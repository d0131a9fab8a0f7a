# frozen_string_literal: true

require "digest/sha1"
require "nblock/exclusion"
require "nblock/handle"

module NBLock
  # One program's object for one key; a drop-in for NoBrainer::Lock.
  #
  # A hold is a lease: it lasts :expire seconds unless it is refreshed; after that, another caller may take the
  # lock over. Methods that ask the store let other threads and fibers run, and can be interrupted by Timeout,
  # Thread#raise, Thread#kill and signals; a grant whose call is interrupted is released. They raise StoreError if
  # the store fails. Times are in seconds.
  class Lock
    class << self
      # Returns a lock object for a key that has a record: idle, with the record. A record whose lease has ended is
      # found too. Asks the store. Raises DocumentNotFound if there is no record.
      def find(key)
        record = RecordList.find(NBLock.client, Options.key(key))[0]
        return found(record) if of?(record)

        raise Error::DocumentNotFound, "the record of #{Options.show(record.key)} is not one of #{name}"
      end

      # As find, but returns nil if there is no record.
      def find?(key)
        find(key)
      rescue Error::DocumentNotFound
        nil
      end

      # All locks that have a record, as a Scope.
      def all
        Scope.new(self, Library::LIST_ALL)
      end

      # The locks whose lease has run out without an unlock, as a Scope. They can be locked like any other.
      def expired
        Scope.new(self, Library::LIST_EXPIRED)
      end

      # Returns how many locks have a record. Asks the store.
      def count
        all.count
      end

      # Whether a record is of a lock of this class.
      def of?(_record) # :nodoc:
        true
      end

      def found(record) # :nodoc:
        (record.reentrant? ? ReentrantLock : self).new(record.key).tap { |lock| lock.record = record }
      end
    end

    # The key, a frozen String.
    attr_reader :key

    # The store's record of the key when Lock.find, all or expired found this lock: a Record. nil for a lock made
    # by new.
    attr_reader :record

    attr_writer :record # :nodoc:

    # key:: String or Symbol, 1 byte to 1 MiB
    # expire:: length of a lease in seconds, 0.001 to 31622400 (366 days); nil means NBLock.config.lock_options
    # timeout:: how many seconds lock and synchronize wait; 0 tries once, Float::INFINITY waits forever; nil means
    #           NBLock.config.lock_options
    # auto_refresh:: whether holds are renewed until they are unlocked. nil means: in synchronize yes, unless an
    #                expire is given for the lock or the call; otherwise no
    #
    # Does not take the lock, and does not ask the store. Raises ArgumentError.
    def initialize(key, options = {})
      Options.allow(options, "#{self.class}.new", *OPTIONS)
      @key = Options.key(key)
      @expire_ms = Options.expire(options[:expire])
      @timeout_ms = Options.timeout(options[:timeout])
      @auto_refresh = Options.switch(options[:auto_refresh], "auto_refresh")
      @packed = NOTHING
    end

    OPTIONS = %i[expire timeout auto_refresh].freeze
    NOTHING = {}.freeze
    private_constant :OPTIONS, :NOTHING

    # Takes the lock as lock does, runs the block, and unlocks, unless the block has. Returns the block's value.
    # Options: :expire, :timeout, :auto_refresh.
    #
    # The hold is renewed while the block runs, unless an expire is given. Raises LockUnavailable as lock does, and
    # LostLock if the lock was not held to the end, even if the block raised (that error is then its cause).
    def synchronize(options = {})
      raise ArgumentError, "synchronize needs a block" unless block_given?

      granted = false
      error = ask(call_options(options, "synchronize", *OPTIONS, scoped: true), ->(_) { granted = true })
      raise Holder.named(error, self, @native.client) if error

      yield
    ensure
      leave(granted)
    end

    # Takes the lock, and waits for it, at most :timeout seconds. Returns nil. Options: :expire, :timeout,
    # :auto_refresh. The hold is not renewed, unless auto_refresh: true is given for the lock or the call.
    #
    # Raises LockUnavailable if the lock was not granted in time, LockInvalidOp if this object already holds it.
    def lock(options = {})
      error = keep(call_options(options, "lock", *OPTIONS))
      raise Holder.named(error, self, @native.client) if error
    end

    # Tries once to take the lock. Returns true if it is held now, false if another holder has it. Options:
    # :expire, :auto_refresh. Raises LockInvalidOp if this object already holds it.
    def try_lock(options = {})
      error = keep(call_options(options, "try_lock", :expire, :auto_refresh, patience: Library::NO_WAIT))
      return true if error.nil?

      error.is_a?(Error::LockUnavailable) ? false : raise(error)
    end

    # Releases the hold. Returns nil.
    #
    # Raises LostLock if the hold was no longer ours, LockInvalidOp if nothing is held, StoreError with the status
    # :indeterminate if no reply arrived (the release continues in the background), Forked if the parent process
    # holds it. The lock is idle after each of these.
    def unlock
      native = in_use
      error = Operation.run { |out, err| Library.unlock_start(native.id, out, err) }
      raise error if error
    end

    # Renews the hold: its lease ends :expire seconds from now. Without :expire, the length that was given last is
    # used again. Does not take the lock again if the hold is gone. Returns nil.
    #
    # Raises LostLock if the hold was no longer ours, LockInvalidOp if nothing is held, Forked if the parent process
    # holds it.
    def refresh(options = {})
      Options.allow(options, "refresh", :expire)
      expire_ms = Options.expire(options[:expire])
      native = in_use
      packed = expire_ms && pack(expire_ms, 0, false)
      error = Operation.run { |out, err| Library.refresh_start(native.id, packed, out, err) }
      raise error if error
    end

    # Whether the hold is certainly ours at this moment. Does not ask the store.
    def held?
      state == :held
    end

    # Whether there is a hold that can no longer be relied on: it was lost, or it is past its deadline, so that
    # another holder may have the lock. Does not ask the store.
    def lost?
      UNRELIABLE.include?(state)
    end

    # The state of this object: :idle, :pending (a call is acquiring or releasing), :held, :overdue (past its deadline:
    # another caller may take it over at any moment), :lost (the next unlock or refresh raises LostLock), or :forked
    # (held by the process that this one was forked from). Does not ask the store.
    def state
      native = @native
      native ? STATES.fetch(Operation.state(native.id)) : :idle
    end

    # Makes the block be called with this lock as soon as the hold is lost or past its deadline, on a thread of its
    # own: once, and again each time that happens after a refresh has recovered the hold. Replaces the block given
    # before. Returns self.
    def on_lost(&block)
      raise ArgumentError, "on_lost needs a block" unless block

      @on_lost = block
      LossWatcher.watch(self) if @native
      self
    end

    # For how many seconds the hold is certainly ours; 0.0 if it is past its deadline. Raises LockInvalidOp if
    # nothing is held. Does not ask the store.
    def remaining
      native = in_use
      Operation.call { |out, error| Library.lock_remaining_ms(native.id, out, error) } / 1000.0
    end

    # The fence of the hold: a number that grows with every grant of this key, for a protected resource that refuses
    # a smaller one than the largest it has seen. Asks the store if the grant brought no fence. Raises LockInvalidOp
    # if nothing is held, LostLock.
    def fence
      native = in_use
      fence = nil
      note = ->(operation) { fence ||= Operation.call { |out, error| Library.op_take_fence(operation, out, error) } }
      error = Operation.run(note) { |out, err| Library.lock_fence_start(native.id, out, err) }
      error ? raise(error) : fence
    end

    # The Time at which the lease of the hold ends. Without a hold: of the record that was found, otherwise nil.
    def expires_at
      return record&.expires_at unless holding?

      milliseconds = Operation.call { |out, error| Library.lock_expires_at_ms(@native.id, out, error) }
      Time.at(milliseconds / 1000, milliseconds % 1000, :millisecond)
    end

    # The text that proves the hold in the store, a String; nil while nothing is held, because every hold has a new
    # one. Keep it secret: anybody who has it can end the hold.
    def instance_token
      Operation.text(:lock_text, @native.id, Library::TEXT_INSTANCE_TOKEN) if holding?
    end

    # The record's primary key: base64 of the key's SHA-1.
    def key_hash
      @key_hash ||= Digest::SHA1.base64digest(key).freeze
    end

    # Locks are equal if they are of the same class and for the same key.
    def ==(other)
      self.class == other.class && key == other.key
    end
    alias eql? ==

    def hash
      [self.class, key].hash
    end

    def inspect
      "#<#{self.class} #{Options.show(key)} #{state}>"
    end
    alias to_s inspect

    STATES = {
      Library::STATE_IDLE => :idle, Library::STATE_PENDING => :pending, Library::STATE_HELD => :held,
      Library::STATE_OVERDUE => :overdue, Library::STATE_LOST => :lost, Library::STATE_FORKED => :forked
    }.freeze
    HOLDING = %i[held overdue].freeze
    UNRELIABLE = %i[lost overdue].freeze
    UNLOCKABLE = %i[held overdue lost].freeze
    private_constant :STATES, :HOLDING, :UNRELIABLE, :UNLOCKABLE

    # A lock is not a document: these raise NotImplementedError.
    %i[save save! save? update update! update? delete destroy].each do |name|
      define_method(name) { |*, **| raise NotImplementedError, "#{self.class} has no #{name}: it is not a document" }
    end

    # A copy is another lock object for the same key, idle.
    def initialize_copy(other)
      super
      @native = @on_lost = nil
    end

    # A descriptor that is readable while the hold is lost or overdue; -1 if there is none.
    def lost_descriptor # :nodoc:
      Library.lock_lost_fd(@native.id)
    end

    def marshal_dump # :nodoc:
      raise TypeError, "an #{self.class} cannot be dumped: pass its key, and make an #{self.class} where it is needed"
    end

    # Calls the on_lost block.
    def tell_lost # :nodoc:
      @on_lost.call(self)
    end

    # The library's handle. Keep this object while its id is used.
    attr_reader :native # :nodoc:

    private

    # Whether there is a hold, as far as this process knows.
    def holding?
      HOLDING.include?(state)
    end

    # Asks for a grant. Returns nil, or the error if there is none. granted.(_) is called when there is one, even if
    # the wait is interrupted at that moment.
    def ask(options, granted)
      native = for_grant
      error = Operation.run(granted) { |out, err| Library.lock_start(native.id, options, out, err) }
      return error if error

      Holder.note(native.id, key)
      LossWatcher.watch(self) if @on_lost
      nil
    end

    # As ask. If an interruption prevents this method from returning a grant, the grant is released.
    def keep(options)
      granted = heard = false
      error = ask(options, ->(_) { granted = true })
      heard = true
      error
    ensure
      give_back(granted, heard)
    end

    # Releases a grant that was not reported to the caller, in the background.
    def give_back(granted, heard)
      Thread.handle_interrupt(Operation::UNINTERRUPTED) do
        next if heard || !granted

        answer = Operation::Answer.take
        Library.unlock_start(@native.id, answer.out, answer.error)
        Library.op_free(answer.handle)
        Operation::Answer.leave(answer)
      end
    end

    # Ends a scope: unlocks what its grant still holds. A forked child has nothing to release.
    #
    # Interruptions that can be deferred do not happen between here and the start of the unlock. Signals cannot be
    # deferred: after one, the unlock is started anyway.
    def leave(granted)
      error = unlock_scope(granted)
      left = true
      raise error if error
    ensure
      unlock_scope(granted) unless left
    end

    def unlock_scope(granted)
      Operation.run do |out, err|
        Library.unlock_start(@native.id, out, err) if granted && UNLOCKABLE.include?(state)
      end
    end

    # The library's handle of a lock that was used before.
    def in_use
      @native || raise(Error::LockInvalidOp, "lock instance #{Options.show(key)} not locked")
    end

    # The library's handle, on the store that is configured now. A lock that is in use stays in its store.
    def for_grant
      client = NBLock.client
      native = @native
      return native if native && (native.client.equal?(client) || (state != :idle && !native.client.closed?))

      MAKING.synchronize do
        @native = make_native(client) unless @native && @native.client.equal?(client)
        @native
      end
    end

    MAKING = Exclusion.new
    private_constant :MAKING

    # A handle of the library's for a lock; it keeps its store open.
    class Native < Handle # :nodoc:
      attr_reader :client

      def initialize(client, id)
        super(id, :lock_free)
        @client = client
        ObjectSpace.define_finalizer(self, Holder.forgetting(id))
      end
    end
    private_constant :Native

    def make_native(client)
      text = FFI::MemoryPointer.new(:char, key.bytesize).put_bytes(0, key)
      id = Operation.call { |out, error| new_handle(client.id, text, key.bytesize, out, error) }
      Native.new(client, id)
    end

    def new_handle(client_id, text, size, out, error)
      Library.lock_new(client_id, text, size, nil, out, error)
    end

    # The options of a call, as the library takes them: the call's, then the lock's, then those of the configuration
    # at this moment. patience: the timeout of a call that takes no :timeout.
    def call_options(options, whose, *names, patience: nil, scoped: false)
      defaults = NBLock.config.lock_options
      plain = options.is_a?(Hash) && options.empty?
      # Most calls set no options: the struct for these is made once. The library only reads it.
      if plain && (made = @packed[whose]) && made.first.equal?(defaults)
        return made.last
      end

      Options.allow(options, whose, *names)
      expire_ms = Options.expire(options[:expire]) || @expire_ms
      patience ||= Options.timeout(options[:timeout]) || @timeout_ms || Options.timeout(defaults[:timeout])
      auto_refresh = Options.switch(options[:auto_refresh], "auto_refresh")
      auto_refresh = @auto_refresh if auto_refresh.nil?
      auto_refresh = scoped && expire_ms.nil? if auto_refresh.nil?
      packed = pack(expire_ms || Options.expire(defaults[:expire]), patience, auto_refresh)
      @packed = { **@packed, whose => [defaults, packed] }.freeze if plain
      packed
    end

    def pack(expire_ms, timeout_ms, auto_refresh)
      packed = Library::LockOptions.new
      packed[:struct_size] = Library::LockOptions.size
      packed[:expire_ms] = expire_ms
      packed[:timeout_ms] = timeout_ms
      packed[:auto_refresh] = auto_refresh ? Library::ON : Library::OFF
      packed
    end
  end
end
