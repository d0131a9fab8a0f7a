# frozen_string_literal: true

# Every test that needs neither NoBrainer nor a server of its own.
require_relative "support"

Dir[File.join(__dir__, "*_test.rb")].sort.each { |file| require file }
