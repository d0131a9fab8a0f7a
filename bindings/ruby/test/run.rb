# frozen_string_literal: true

# Every test that does not need NoBrainer.
require_relative "support"

Dir[File.join(__dir__, "*_test.rb")].sort.each { |file| require file }
