# frozen_string_literal: true

module NBLock
  # A handle of the library, freed when this object is collected. Freeing a held lock abandons the hold: it is no
  # longer renewed, and its lease runs out (R15).
  class Handle # :nodoc:
    attr_reader :id

    # free: the function of Library that frees such a handle. It never waits.
    def initialize(id, free)
      @id = id
      ObjectSpace.define_finalizer(self, Handle.finalizer(id, free))
    end

    # A method of its own, so that the finalizer does not keep the object.
    def self.finalizer(id, free)
      ->(_) { Library.public_send(free, id) }
    end
  end
end
