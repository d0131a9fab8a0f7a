# frozen_string_literal: true

module NBLock
  # A Mutex whose error says what to do instead where Ruby allows no mutex.
  class Exclusion < Mutex # :nodoc:
    def synchronize
      entered = false
      super do
        entered = true
        yield
      end
    rescue ThreadError
      raise if entered

      raise Error::LockInvalidOp, "signal handlers cannot do this: in Ruby they cannot take a mutex, which the first " \
                                  "use of a lock and NBLock.close need. Use this lock object once before, or do it in a " \
                                  "thread: Thread.new { ... }"
    end
  end
end
