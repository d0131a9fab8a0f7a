# frozen_string_literal: true

require_relative "lib/nblock/version"

Gem::Specification.new do |s|
  s.name = "nblock"
  s.version = NBLock::VERSION
  # The gem carries libnblock as it was built on this kind of machine.
  s.platform = Gem::Platform::CURRENT
  s.summary = "Distributed locks with leases, fencing and loss detection"
  s.description = "Locks between processes of one machine, without a server, or between machines, through RethinkDB. " \
                  "NBLock::Lock is a drop-in for NoBrainer::Lock that shares its table and waits without polling."
  s.authors = ["The nblock authors"]
  s.licenses = ["MIT", "Apache-2.0"]
  s.required_ruby_version = ">= 3.0"
  s.files = Dir["lib/**/*.{rb,so}", "sig/**/*.rbs", "LICENSE-*"]
  s.add_dependency "ffi", "~> 1.15", ">= 1.15.5"
end
