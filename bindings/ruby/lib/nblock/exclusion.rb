# frozen_string_literal: true

module NBLock
  # A Mutex that says, where Ruby lets none be taken, what to do instead.
  class Exclusion < Mutex # :nodoc:
    def synchronize
      entered = false
      super do
        entered = true
        yield
      end
    rescue ThreadError
      raise if entered

      raise Error::LockInvalidOp, "signal handlers cannot do this: Ruby lets them take no mutex, which the first use " \
                                  "of a lock and NBLock.close need. Use this lock object once before, or do it in a " \
                                  "thread: Thread.new { ... }"
    end
  end
end
