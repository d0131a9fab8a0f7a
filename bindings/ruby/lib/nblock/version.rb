# frozen_string_literal: true

module NBLock
  VERSION = "0.1.0"
end
