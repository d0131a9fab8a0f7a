# A worker of the history test, in Ruby: what worker.c does.
#
#     ruby worker.rb URL KEY DIRECTORY WHO SEED EXPIRE_MS
require "nblock"

url, key, directory, who, seed, expire_ms = ARGV
EXPIRE = Integer(expire_ms) / 1000.0
COUNTER = File.open("#{directory}/counter", "r+")
LOG = File.open("#{directory}/log", "a")
LOG.sync = true
NBLock.configure { |config| config.url = url }

def moment
  Process.clock_gettime(Process::CLOCK_BOOTTIME, :nanosecond)
end

# A line in one write: lines of several processes do not mix.
def note(*words)
  LOG.syswrite("\n#{words.join(" ")} .\n")
end

# Counted from before it was asked for: never too late. 1 where it has passed.
def deadline_of(lock)
  now = moment
  remaining_ms = lock.held? ? (lock.remaining * 1000).floor : 0
  remaining_ms.positive? ? now + remaining_ms * 1_000_000 : 1
end

# No answer is no grant; everything else is a defect.
def check(error)
  raise error unless %i[unreachable indeterminate].include?(error.status)
end

# Reads the number, and writes it back one higher: two of these at once would lose one.
def use(lock, name, deadline, renewed, chance)
  number = Integer(COUNTER.pread(20, 0).strip, 10)
  if chance.rand(100).zero?
    # Long enough for its lease to run out now and then.
    sleep EXPIRE * chance.rand * 1.7
    if renewed && (later = deadline_of(lock)) > deadline
      deadline = later
      note "renewed", *name, deadline
    end
  end
  now = moment
  return unless now < deadline

  note "writing", *name, number, now
  COUNTER.pwrite(format("%19d\n", number + 1), 0)
  note "wrote", *name, moment
end

# Locks, and answers the fence and the deadline; nil where it was not granted in time.
def acquire(lock, options)
  lock.lock(options)
  [lock.fence, deadline_of(lock)]
rescue NBLock::Error::LockUnavailable
  nil
end

def release(lock, name)
  lock.unlock
rescue NBLock::Error::LostLock
  note "lost", *name, moment
rescue NBLock::Error::StoreError => error
  check(error)
end

def take_turn(key, name, chance)
  lock = NBLock::Lock.new(key)
  timeout_ms, renewed = [5, 200, 30_000].sample(random: chance), chance.rand(4).zero?
  asked = moment
  fence, deadline = acquire(lock, expire: EXPIRE, timeout: timeout_ms / 1000.0, auto_refresh: renewed)
  now = moment
  # Over before it began: it is not relied on.
  return release_unused(lock) if deadline && deadline <= now

  note "waited", *name, asked, timeout_ms * 1_000_000, now
  return unless deadline

  note "granted", *name, fence, now, deadline
  use(lock, name, deadline, renewed, chance)
  note "released", *name, moment
  release(lock, name)
rescue NBLock::Error::StoreError => error
  check(error)
  release_unused(lock)
rescue NBLock::Error::LostLock
  # Lost before it was relied on.
end

def release_unused(lock)
  lock.unlock
rescue NBLock::Error::LostLock, NBLock::Error::LockInvalidOp, NBLock::Error::StoreError
  # It is over anyhow.
end

def connect
  NBLock.client
rescue NBLock::Error::StoreError => error
  # A connection that is cut while it is greeted reads like a wrong URL.
  check(error) unless error.status == :store
  sleep 0.02
  retry
end

connect
Thread.abort_on_exception = true
threads = 2.times.map do |number|
  Thread.new do
    chance = Random.new(Integer(seed) * 2 + number)
    (1..).each { |turn| take_turn(key, [Integer(who) + number, turn], chance) }
  end
end
threads.each(&:join)
