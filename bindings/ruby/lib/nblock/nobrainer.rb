# frozen_string_literal: true

require "nobrainer"
require "nblock"

# For use with NoBrainer: NBLock uses NoBrainer's settings where it has none of its own, and raises the errors that
# programs written for NoBrainer::Lock rescue.
#
#   require "nblock/nobrainer"
#   NoBrainer.configure { |c| c.distributed_lock_class = "NBLock::Lock" }
module NBLock
  # The settings that a configuration takes from NoBrainer, at the moment of each use, if it does not set them itself.
  module NoBrainerConfig # :nodoc:
    # NoBrainer's servers, with the current database (NoBrainer.run_with(db: ...)), which is created if it does not
    # exist, as NoBrainer does. The account is that of the first URL.
    def url
      super || nobrainer_url
    end

    def app_name
      super || (nobrainer&.app_name && Options.utf8(nobrainer.app_name.to_s, "app_name"))
    end

    def lock_options
      @lock_options || (nobrainer ? Config::LOCK_OPTIONS.merge(nobrainer.lock_options) : super)
    end

    # Never cached: NoBrainer's settings may change at any moment.
    def client_settings
      [url, app_name, op_timeout, connect_timeout].freeze
    end

    private

    def nobrainer
      ::NoBrainer::Config if ::NoBrainer::Config.configured?
    end

    def nobrainer_url
      servers = (nobrainer&.rethinkdb_urls || []).compact.map { |url| ::NoBrainer::Connection.new(url).parsed_uri }
      return if servers.empty?

      first = servers.first
      run_options = ::NoBrainer.current_run_options
      database = run_options[:db].to_s.empty? ? first[:db] : run_options[:db].to_s
      account = "#{escape(first[:user])}:#{escape(first[:password])}@" if first[:user] || first[:password]
      hosts = servers.map { |server| "#{server[:host]}:#{server[:port]}" }.uniq.join(",")
      "rethinkdb://#{account}#{hosts}/#{escape(database)}?#{nobrainer_options(run_options)}"
    end

    def nobrainer_options(run_options)
      options = { create: 1 }
      options[:durability] = "soft" if run_options[:durability].to_s == "soft"
      if (ssl = nobrainer.ssl_options)
        options[:tls] = 1
        options[:ca] = ssl[:ca_certs] if ssl[:ca_certs]
      end
      options.map { |name, value| "#{name}=#{escape(value)}" }.join("&")
    end

    # Percent-escapes every byte that has a meaning in a URL.
    def escape(text)
      text.to_s.b.gsub(/[^A-Za-z0-9._~-]/n) { |byte| format("%%%02X", byte.ord) }
    end
  end

  Config.prepend(NoBrainerConfig)

  # From here on, each error is a subclass of NoBrainer's error of the same name. A program that kept the earlier class
  # still rescues the new errors.
  %i[LockUnavailable LostLock LockInvalidOp DocumentNotFound].each do |name|
    before = Error.__send__(:remove_const, name)
    namesake = Class.new(::NoBrainer::Error.const_get(name)) do
      include Error
      include Error::NamesHolder if name == :LockUnavailable
    end
    Error.const_set(name, namesake)
    before.define_singleton_method(:===) { |error| namesake === error || super(error) } # rubocop:disable Style/CaseEquality
  end
end
