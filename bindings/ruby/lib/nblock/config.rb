# frozen_string_literal: true

module NBLock
  # What NBLock.configure yields.
  class Config
    # NoBrainer's defaults, in seconds.
    LOCK_OPTIONS = { expire: 60, timeout: 10 }.freeze

    # The store: "redis://host:6379", "postgres://user:password@host/database",
    # "rethinkdb://user:password@host:28015/database", "embedded:", "embedded:/directory",
    # "memory:", "memory:NAME"; nil for the environment's NBLOCK_URL, else NoBrainer's environment, else
    # /etc/nblock.conf, else "embedded:".
    attr_reader :url

    # Shown to whoever lists the locks, at most 255 bytes; nil for the program's name.
    attr_reader :app_name

    # How long one request to the store may take, in seconds; nil for 5.
    attr_reader :op_timeout

    # How long opening the store may take, in seconds; nil for 5.
    attr_reader :connect_timeout

    def url=(url)
      @url = url && text(url, "url")
    end

    def app_name=(name)
      @app_name = name && text(name, "app_name")
    end

    def op_timeout=(seconds)
      Options.limit(seconds, "op_timeout")
      @op_timeout = seconds
    end

    def connect_timeout=(seconds)
      Options.limit(seconds, "connect_timeout")
      @connect_timeout = seconds
    end

    # How long leases last (:expire) and how long lock waits (:timeout), in seconds, where neither the
    # lock nor the call says. What is left out stays as NoBrainer has it: 60 and 10.
    def lock_options
      @lock_options || LOCK_OPTIONS
    end

    def lock_options=(options)
      @lock_options = options && begin
        Options.allow(options, "lock_options", :expire, :timeout)
        Options.expire(options[:expire])
        Options.timeout(options[:timeout])
        LOCK_OPTIONS.merge(options.compact).freeze
      end
    end

    # What a client is made of. Two that are equal are one client.
    def client_settings # :nodoc:
      @client_settings ||= [url, app_name, op_timeout, connect_timeout].freeze
    end

    def initialize_copy(other)
      super
      @client_settings = nil
    end

    # Once it is in use it changes no more.
    def freeze
      client_settings
      super
    end

    # Without a password.
    def inspect
      "#<#{self.class} url=#{url&.sub(%r{//[^@/]*@}, "//...@").inspect} app_name=#{app_name.inspect} " \
        "lock_options=#{lock_options}>"
    end

    private

    def text(given, name)
      raise ArgumentError, "#{name} is a #{given.class}: it is a String" unless given.is_a?(String)
      raise ArgumentError, "#{name} has a NUL in it: no #{name} has" if given.include?("\0")

      Options.utf8(given, name)
    end
  end
end
