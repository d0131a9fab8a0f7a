# What increment.c does, in Ruby: ruby demo/increment.rb NAME COUNT COUNTER LOG
require "nblock"

name, count, counter, log = ARGV
lock = NBLock::Lock.new("jobs:demo", expire: 1, timeout: 60)
Integer(count).times do
  lock.synchronize do
    number = Integer(File.read(counter), 10) + 1
    File.write(counter, format("%019d\n", number), mode: "r+")
    File.write(log, "#{number} #{name} #{lock.fence}\n", mode: "a")
  end
  sleep 0.0003
end
