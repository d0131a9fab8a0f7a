# frozen_string_literal: true

# Finding the library, and what is said when it is not there.
class LibraryTest < StoreTest
  def load_with(library)
    _, output, waiter = ruby("puts NBLock::Library::PATH", "NBLOCK_LIBRARY" => library)
    text = output.read
    [waiter.value.success?, text]
  end

  def test_that_the_gems_own_library_is_taken
    ["", nil].each { |unset| assert_equal [true, "#{NBLock::Library::PATH}\n"], load_with(unset) }
  end

  def test_that_another_library_can_be_named
    copy = File.join(fresh_directory, "copy.so")
    FileUtils.cp(NBLock::Library::PATH, copy)
    assert_equal [true, "#{copy}\n"], load_with(copy)
  end

  def test_that_a_missing_library_is_one_error_in_words
    loaded, text = load_with("/nowhere/libnblock.so")
    refute loaded
    assert_match(%r{libnblock was not found.*/nowhere/libnblock\.so.*NBLOCK_LIBRARY}m, text)
    assert_match(/\(LoadError\)/, text)
    refute_match(/NotFoundError|NameError/, text)
  end

  def test_that_a_gem_without_its_library_says_where_it_looked
    copy = fresh_directory
    FileUtils.cp_r(File.expand_path("..", File.dirname(NBLock::Library::PATH)), copy)
    FileUtils.rm(File.join(copy, "lib/nblock/libnblock.so"))
    env = { "LD_LIBRARY_PATH" => nil }
    text, status = Open3.capture2e(env, RbConfig.ruby, "-I#{copy}/lib", "-e", "require 'nblock'")
    return assert(status.success?) if text.empty? # This machine has a libnblock of its own.

    assert_match(%r{#{copy}/lib/nblock/libnblock\.so.*libnblock\.so\.0.*NBLOCK_LIBRARY}m, text)
    refute_predicate status, :success?
  end

  # A shared library of ours, made of C.
  def compiled(source)
    file = File.join(fresh_directory, "other.so")
    _, status = Open3.capture2e("cc", "-shared", "-fPIC", "-o", file, "-x", "c", "-", stdin_data: source)
    assert_predicate status, :success?
    file
  end

  def test_that_an_older_or_foreign_library_is_refused
    loaded, text = load_with(compiled("unsigned nbl_abi_version(void) { return 0; }"))
    refute loaded
    assert_match(/has version 0 of nblock's interface/, text)

    loaded, text = load_with(compiled("int something_else(void) { return 0; }"))
    refute loaded
    assert_match(/is not libnblock/, text)
  end

  def test_that_the_structs_are_as_the_header_has_them
    names = { "nbl_error_t" => :ErrorStruct, "nbl_client_options_t" => :ClientOptions,
              "nbl_lock_options_t" => :LockOptions, "nbl_list_options_t" => :ListOptions,
              "nbl_record_t" => :RecordStruct, "nbl_ping_t" => :PingStruct }
    lines = names.flat_map do |c_name, ruby_name|
      fields = NBLock::Library.const_get(ruby_name).members
      fields.map { |field| %(printf("#{ruby_name} #{field} %zu\\n", offsetof(#{c_name}, #{field}));) } +
        [%(printf("#{ruby_name} size %zu\\n", sizeof(#{c_name}));)]
    end
    statuses = %i[OK UNAVAILABLE LOST NOT_FOUND PENDING CANCELLED]
    failures = %i[INVALID_OP INVALID_ARGUMENT BAD_HANDLE UNREACHABLE INDETERMINATE DENIED STORE FORKED INTERNAL
                  RESOURCES BUFFER_TOO_SMALL]
    others = %i[NO_WAIT FOREVER ON OFF LIST_ALL LIST_EXPIRED TEXT_INSTANCE_TOKEN STATE_IDLE STATE_PENDING STATE_HELD STATE_OVERDUE STATE_LOST STATE_FORKED]
    constants = (statuses + others).to_h { |name| ["NBL_#{name}", name] }
    constants.update(failures.to_h { |name| ["NBL_ERR_#{name}", name] })
    lines += constants.map { |c_name, ruby_name| %(printf("#{ruby_name} is %d\\n", (int)#{c_name});) }
    header = File.expand_path("../../../include", __dir__)
    program = File.join(fresh_directory, "layout")
    source = "#include <stdio.h>\n#include <nblock.h>\nint main(void) { #{lines.join("\n")} return 0; }"
    text, status = Open3.capture2e("cc", "-I#{header}", "-o", program, "-x", "c", "-", stdin_data: source)
    assert_predicate status, :success?, text
    Open3.capture2e(program).first.each_line do |line|
      name, what, number = line.split
      constant = NBLock::Library.const_get(name)
      ours = case what
             when "is" then constant
             when "size" then constant.size
             else constant.offset_of(what.to_sym)
             end
      assert_equal number.to_i, ours, line
    end
  end

  def test_that_every_status_has_its_exception
    header = File.read(File.expand_path("../../../include/nblock.h", __dir__))
    failures = header.scan(/^#define NBL_ERR_(\w+) \((-\d+)\)$/).to_h { |name, number| [number.to_i, name] }
    # Never reaches a program: the gem asks again with a larger buffer.
    assert_equal NBLock::Library::BUFFER_TOO_SMALL, failures.key("BUFFER_TOO_SMALL")
    failures.delete(NBLock::Library::BUFFER_TOO_SMALL)
    assert_operator failures.size, :>=, 10
    expected = { -1 => NBLock::Error::LockInvalidOp, -2 => ArgumentError, -3 => NBLock::Error::LockInvalidOp,
                 -8 => NBLock::Error::Forked }
    failures.each do |number, name|
      error = NBLock::Error.for(number, "in words")
      assert_instance_of expected.fetch(number, NBLock::Error::StoreError), error
      assert_equal "in words", error.message
      assert_equal name.downcase.to_sym, error.status if error.is_a?(NBLock::Error::StoreError)
    end
  end
end
