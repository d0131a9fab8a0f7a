# frozen_string_literal: true

require "nobrainer"
require "nblock"

# Beside NoBrainer: NBLock takes its settings where it was given none of its own, and raises what
# programs rescue that were written for NoBrainer::Lock.
#
#   require "nblock/nobrainer"
#   NoBrainer.configure { |c| c.distributed_lock_class = "NBLock::Lock" }
module NBLock
  # What a configuration takes from NoBrainer, at the moment of each use, where it says nothing itself.
  module NoBrainerConfig # :nodoc:
    # NoBrainer's servers, with the database of the moment (NoBrainer.run_with(db: ...)), which is created
    # where it is not there, as NoBrainer does it. The account is that of the first URL.
    def url
      super || nobrainer_url
    end

    def app_name
      super || (nobrainer&.app_name && Options.utf8(nobrainer.app_name.to_s, "app_name"))
    end

    def lock_options
      @lock_options || (nobrainer ? Config::LOCK_OPTIONS.merge(nobrainer.lock_options) : super)
    end

    # Never kept: what NoBrainer says may change at any moment.
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

    # Every byte that means something in a URL as a percent-escape.
    def escape(text)
      text.to_s.b.gsub(/[^A-Za-z0-9._~-]/n) { |byte| format("%%%02X", byte.ord) }
    end
  end

  Config.prepend(NoBrainerConfig)

  # Each error is a subclass of NoBrainer's of the same name from here on. A program that kept the class
  # of before still rescues what is raised now.
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
