# frozen_string_literal: true

module NBLock
  # Checks the arguments of callers: keys, options, durations. A wrong one is an ArgumentError that names the value
  # and the rule.
  module Options # :nodoc:
    # The longest lease, in milliseconds: 366 days (R21).
    MAX_EXPIRE_MS = 366 * 86_400_000
    # The longest key, in bytes: 1 MiB (R21).
    MAX_KEY_BYTES = 1 << 20
    # A timeout longer than a hundred years means forever.
    FOREVER_MS = 100 * MAX_EXPIRE_MS
    # What an expire and a limit must be, as messages say it.
    EXPIRE_RULE = "must be 0.001 seconds to 366 days"
    LIMIT_RULE = "must be 0.001 to 3600 seconds"

    class << self
      # Raises for options that `whose` does not take.
      def allow(options, whose, *names)
        raise ArgumentError, "#{whose} takes a Hash of options (got #{show(options)})" unless options.is_a?(Hash)

        unknown = options.keys - names
        return if unknown.empty?

        raise ArgumentError, "unknown option #{show(unknown.first)}: #{whose} takes #{names.map(&:inspect).join(", ")}"
      end

      # A key as the library takes it: frozen UTF-8 (R21).
      def key(given)
        unless given.is_a?(String) || given.is_a?(Symbol)
          raise ArgumentError, "key must be a String or a Symbol (got #{show(given)})"
        end

        key = utf8(given.to_s, "key")
        return key if key.bytesize.between?(1, MAX_KEY_BYTES)

        raise ArgumentError, "key must have 1 byte to 1 MiB (#{MAX_KEY_BYTES} bytes) of UTF-8 (got #{key.bytesize} bytes)"
      end

      # An owner token of a reentrant lock (R17).
      def owner_token(given)
        raise ArgumentError, "instance_token must be a String (got #{show(given)})" unless given.is_a?(String)

        token = utf8(given, "instance_token")
        return token if token.bytesize.between?(1, 255) && !token.include?("\0")

        raise ArgumentError, "instance_token must have 1 to 255 bytes of UTF-8, none of them NUL (got #{show(given)})"
      end

      # The length of a lease: seconds to milliseconds, nil if none is given.
      def expire(given)
        return if given.nil?

        milliseconds = seconds(given, "expire", EXPIRE_RULE) * 1000
        return milliseconds.round if milliseconds.between?(1, MAX_EXPIRE_MS)

        raise ArgumentError, "expire #{EXPIRE_RULE} (got #{show(given)})"
      end

      # How long to wait: seconds to milliseconds, nil if nothing is given. Zero or less means one try, as in
      # NoBrainer.
      def timeout(given)
        return if given.nil?

        milliseconds = seconds(given, "timeout", "must be a number of seconds, or Float::INFINITY") * 1000
        return Library::NO_WAIT unless milliseconds.positive?

        milliseconds > FOREVER_MS ? Library::FOREVER : milliseconds.ceil
      end

      def switch(given, name)
        return given if given.nil? || given == true || given == false

        raise ArgumentError, "#{name} must be true, false or nil (got #{show(given)})"
      end

      # The limit of one request, or of opening a store, in milliseconds.
      def limit(given, name)
        return if given.nil?

        milliseconds = seconds(given, name, LIMIT_RULE) * 1000
        return milliseconds.round if milliseconds.between?(1, 3_600_000)

        raise ArgumentError, "#{name} #{LIMIT_RULE} (got #{show(given)})"
      end

      # Text as UTF-8. Binary strings are taken as UTF-8 if they are valid.
      def utf8(given, name)
        text = given.encoding == Encoding::BINARY ? given.dup.force_encoding(Encoding::UTF_8) : given
        text = text.encode(Encoding::UTF_8)
        raise ArgumentError, "#{name} must be valid UTF-8 (got #{show(given)})" unless text.valid_encoding?

        text.frozen? ? text : text.dup.freeze
      rescue EncodingError
        raise ArgumentError, "#{name} must be text that UTF-8 can encode (got #{show(given)})"
      end

      # A value as a message shows it.
      def show(value)
        shown = value.inspect
        shown.length > 80 ? "#{shown[0, 77]}..." : shown
      end

      private

      # A number of seconds: a Numeric, or something like ActiveSupport::Duration, which responds to to_f. Text and
      # points in time respond to it too, but are not accepted.
      def seconds(given, name, rule)
        counts = given.respond_to?(:to_f) && !given.is_a?(String) && !given.respond_to?(:strftime)
        seconds = counts ? given.to_f : Float::NAN
        raise ArgumentError, "#{name} #{rule} (got #{show(given)})" if seconds.nan?

        seconds
      rescue RangeError
        raise ArgumentError, "#{name} #{rule} (got #{show(given)})"
      end
    end
  end
end
