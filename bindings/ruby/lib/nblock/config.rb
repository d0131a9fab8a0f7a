# frozen_string_literal: true

module NBLock
  # The configuration, which NBLock.configure yields.
  class Config
    # NoBrainer's defaults, in seconds.
    LOCK_OPTIONS = { expire: 60, timeout: 10 }.freeze

    # The URL of the store: "embedded:", "embedded:/directory", "memory:", "memory:NAME", "redis://host:6379",
    # "postgres://user:password@host/database", "rethinkdb://user:password@host:28015/database". With nil, the store
    # is, in this order: the environment variable NBLOCK_URL, NoBrainer's environment, /etc/nblock.conf, "embedded:".
    attr_reader :url

    # The name that is shown when locks are listed, at most 255 bytes; nil means the name of the script that was started.
    attr_reader :app_name

    # The limit for one request to the store, in seconds, 0.001 to 3600; nil means 5.
    attr_reader :op_timeout

    # The limit for opening the store, in seconds, 0.001 to 3600; nil means 5.
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

    # The length of leases (:expire) and how long lock waits (:timeout), in seconds, if neither the lock nor the
    # call sets them. A value that is left out is NoBrainer's default: 60 and 10.
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

    # The settings of a client. Equal settings mean the same client.
    def client_settings # :nodoc:
      @client_settings ||= [url, app_name, op_timeout, connect_timeout].freeze
    end

    def initialize_copy(other)
      super
      @client_settings = nil
    end

    # A configuration in use does not change any more.
    def freeze
      client_settings
      super
    end

    # Shows no password.
    def inspect
      "#<#{self.class} url=#{url&.sub(%r{//[^@/]*@}, "//...@").inspect} app_name=#{app_name.inspect} " \
        "lock_options=#{lock_options}>"
    end

    private

    def text(given, name)
      raise ArgumentError, "#{name} must be a String (got #{Options.show(given)})" unless given.is_a?(String)
      raise ArgumentError, "#{name} must not contain a NUL character" if given.include?("\0")

      Options.utf8(given, name)
    end
  end
end
