# frozen_string_literal: true

# The signatures: they are valid, and name what there is, no more and no less.
class SignaturesTest < Minitest::Test
  FILE = File.expand_path("../sig/nblock.rbs", __dir__)

  # What the classes have for the gem's own use.
  OWN = {
    NBLock::Lock => { class: %i[of? found], instance: %i[record= native lost_descriptor tell_lost marshal_dump initialize_copy] },
    NBLock::ReentrantLock => { class: %i[of? found], instance: [] },
    NBLock::Config => { class: [], instance: %i[client_settings freeze initialize_copy] }
  }.freeze

  def test_that_the_signatures_are_valid
    rbs = Gem.bin_path("rbs", "rbs")
    text, status = Open3.capture2e(RbConfig.ruby, "-W0", rbs, "-I", File.dirname(FILE), "validate", "--silent")
    assert_predicate status, :success?, text
  rescue Gem::GemNotFoundException
    puts "SKIPPED ruby-rbs-validate: this Ruby comes without the rbs gem"
  end

  # The methods that the file declares for a class, by its name at the start of a line.
  def declared(name)
    body = File.read(FILE)[/^  class #{name}\b.*?^  end$/m]
    methods = body.scan(/^    def (self\.)?([a-z_]+[?!=]?|==):/).group_by(&:first)
    methods = methods.transform_values { |found| found.map { |_, method| method.to_sym } }
    readers = body.scan(/^    attr_(?:reader|accessor) (\w+):/).flatten.map(&:to_sym)
    writers = body.scan(/^    attr_accessor (\w+):/).flatten.map { |attribute| :"#{attribute}=" }
    { class: methods.fetch("self.", []), instance: methods.fetch(nil, []) + readers + writers - %i[initialize] }
  end

  def test_that_they_name_what_there_is
    [NBLock::Lock, NBLock::ReentrantLock, NBLock::Scope, NBLock::Config].each do |of|
      own = OWN.fetch(of, { class: [], instance: [] })
      there = { class: of.singleton_methods(false) - own[:class],
                instance: of.public_instance_methods(false) - own[:instance] }
      said = declared(of.name.delete_prefix("NBLock::"))
      assert_equal there[:class].sort, said[:class].sort, of.name
      assert_equal there[:instance].sort, said[:instance].sort, of.name
    end
    assert_equal (NBLock::Record.members + %i[expired? foreign? reentrant? break]).sort, declared("Record")[:instance].sort
  end
end
