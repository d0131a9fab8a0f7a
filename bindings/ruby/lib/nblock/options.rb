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

    class << self
      # Raises for options that `whose` does not take.
      def allow(options, whose, *names)
        raise ArgumentError, "#{whose} takes a Hash of options, not #{show(options)}" unless options.is_a?(Hash)

        unknown = options.keys - names
        return if unknown.empty?

        raise ArgumentError, "unknown option #{show(unknown.first)}: #{whose} takes #{names.map(&:inspect).join(", ")}"
      end

      # A key as the library takes it: frozen UTF-8 (R21).
      def key(given)
        unless given.is_a?(String) || given.is_a?(Symbol)
          raise ArgumentError, "key is #{show(given)}: a key is a String or a Symbol"
        end

        key = utf8(given.to_s, "key")
        return key if key.bytesize.between?(1, MAX_KEY_BYTES)

        raise ArgumentError, "key has #{key.bytesize} bytes: a key has 1 to #{MAX_KEY_BYTES} bytes of UTF-8"
      end

      # An owner token of a reentrant lock (R17).
      def owner_token(given)
        raise ArgumentError, "instance_token is #{show(given)}: it is a String" unless given.is_a?(String)

        token = utf8(given, "instance_token")
        return token if token.bytesize.between?(1, 255) && !token.include?("\0")

        raise ArgumentError, "instance_token is #{show(given)}: it has 1 to 255 bytes of UTF-8, none of them NUL"
      end

      # The length of a lease: seconds to milliseconds, nil if none is given.
      def expire(given)
        return if given.nil?

        milliseconds = seconds(given, "expire", "a lease lasts 0.001 seconds to 366 days") * 1000
        return milliseconds.round if milliseconds.between?(1, MAX_EXPIRE_MS)

        raise ArgumentError, "expire is #{show(given)}: a lease lasts 0.001 seconds to 366 days"
      end

      # How long to wait: seconds to milliseconds, nil if nothing is given. Zero or less means one try, as in
      # NoBrainer.
      def timeout(given)
        return if given.nil?

        milliseconds = seconds(given, "timeout", "it is a number of seconds, or Float::INFINITY") * 1000
        return Library::NO_WAIT unless milliseconds.positive?

        milliseconds > FOREVER_MS ? Library::FOREVER : milliseconds.ceil
      end

      def switch(given, name)
        return given if given.nil? || given == true || given == false

        raise ArgumentError, "#{name} is #{show(given)}: it is true, false or nil"
      end

      # The limit of one request, or of opening a store, in milliseconds.
      def limit(given, name)
        return if given.nil?

        milliseconds = seconds(given, name, "it is 0.001 to 3600 seconds") * 1000
        return milliseconds.round if milliseconds.between?(1, 3_600_000)

        raise ArgumentError, "#{name} is #{show(given)}: it is 0.001 to 3600 seconds"
      end

      # Text as UTF-8. Binary strings are taken as UTF-8 if they are valid.
      def utf8(given, name)
        text = given.encoding == Encoding::BINARY ? given.dup.force_encoding(Encoding::UTF_8) : given
        text = text.encode(Encoding::UTF_8)
        raise ArgumentError, "#{name} is #{show(given)}: it is not valid UTF-8" unless text.valid_encoding?

        text.frozen? ? text : text.dup.freeze
      rescue EncodingError
        raise ArgumentError, "#{name} is #{show(given)}: it cannot be written in UTF-8"
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
        raise ArgumentError, "#{name} is #{show(given)}: #{rule}" if seconds.nan?

        seconds
      rescue RangeError
        raise ArgumentError, "#{name} is #{show(given)}: #{rule}"
      end
    end
  end
end
