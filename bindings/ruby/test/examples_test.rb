# frozen_string_literal: true

# The examples, as a reader would run them.
class ExamplesTest < StoreTest
  EXAMPLES = File.expand_path("../../../examples/ruby", __dir__)

  def example(name, *arguments)
    Open3.capture2e({ "NBLOCK_URL" => NBLock.config.url }, RbConfig.ruby, File.join(EXAMPLES, name), *arguments)
  end

  def test_the_program_of_the_start_page
    page = File.read(File.expand_path("../../../docs/start.md", __dir__))
    program = page[/^```ruby \S+\n(.*?)^```/m, 1]
    text, status = Open3.capture2e({ "NBLOCK_URL" => NBLock.config.url }, RbConfig.ruby, "-e", program)
    assert_equal ["working\n", true], [text, status.success?]
  end

  def test_once_a_day
    assert_equal ["running the report\n", true], example("once_a_day.rb").then { |text, status| [text, status.success?] }
    assert_match(/\Aprocess \d+ on \S+ has run it at 20/, example("once_a_day.rb").first)
  end

  def test_worker
    2.times do
      text, status = example("worker.rb", "3")
      assert_predicate status, :success?, text
      assert_match(/\Aworking, with fence \d+\nstep 1\nstep 2\nstep 3\ndone\n\z/, text)
    end
  end

  def test_the_web_application
    app = nil
    rack = Object.new
    rack.define_singleton_method(:run) { |given| app = given }
    rack.instance_eval(File.read(File.join(EXAMPLES, "config.ru")), "config.ru")
    assert_equal 200, app.call({}).first
    NBLock::Lock.new("examples:index").synchronize { assert_equal 503, app.call({}).first }
  end
end
