# frozen_string_literal: true

require_relative "behaviour"

# The behaviour on every store that is there.
stores = { "Embedded" => nil, "Memory" => "memory:ruby-behaviour" }
if ENV["NBLOCK_TEST_RETHINKDB_URL"].to_s.empty?
  puts "SKIPPED ruby-rethinkdb: NBLOCK_TEST_RETHINKDB_URL does not name a server"
else
  stores["RethinkDB"] = ENV.fetch("NBLOCK_TEST_RETHINKDB_URL")
end

stores.each do |name, url|
  { NBLock::Lock => LockBehaviour, NBLock::ReentrantLock => ReentrantLockBehaviour }.each do |lock_class, behaviour|
    tests = Class.new(StoreTest) do
      # Nearest to the test's own, so that it runs before what the behaviour prepares.
      include(Module.new { define_method(:setup) { url ? use_store(url) : super() } })
      include behaviour
      define_method(:lock_class) { lock_class }
    end
    Object.const_set("#{lock_class.name.delete(":").delete_prefix("NB")}On#{name}", tests)
  end
end
