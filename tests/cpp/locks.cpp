// Locks as C++ has them: guards, timeouts, exceptions, moves, loss. Argument: the URL of a store.
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <typeinfo>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "check.hpp"

using namespace std::chrono_literals;
using nblock::lock_state;

static_assert(std::is_nothrow_move_constructible_v<nblock::client>);
static_assert(std::is_nothrow_move_assignable_v<nblock::client>);
static_assert(std::is_nothrow_move_constructible_v<nblock::lock> && std::is_nothrow_move_assignable_v<nblock::lock>);
static_assert(std::is_nothrow_move_constructible_v<nblock::reentrant_lock>);
static_assert(!std::is_copy_constructible_v<nblock::client> && !std::is_copy_assignable_v<nblock::client>);
static_assert(!std::is_copy_constructible_v<nblock::lock> && !std::is_copy_assignable_v<nblock::lock>);
static_assert(noexcept(std::declval<nblock::lock &>().unlock()));
static_assert(std::is_base_of_v<std::system_error, nblock::error>);
static_assert(std::is_base_of_v<nblock::error, nblock::lock_unavailable>);
static_assert(std::is_base_of_v<nblock::error, nblock::lost_lock>);
static_assert(std::is_base_of_v<nblock::error, nblock::lock_invalid_op>);

static nblock::lock_options options(std::optional<std::chrono::milliseconds> expire,
                                    std::optional<std::chrono::milliseconds> timeout = std::nullopt)
{
    nblock::lock_options options;
    options.expire = expire;
    options.timeout = timeout;
    return options;
}

static void guards(const nblock::client &client)
{
    nblock::lock a(client, "guard:a"), b(client, "guard:b"), rival(client, "guard:a");
    {
        const std::lock_guard<nblock::lock> guard(a);
        CHECK(a.held() && a.state() == lock_state::held && !a.lost());
        CHECK(!rival.try_lock() && rival.state() == lock_state::idle);
        CHECK(!rival.try_lock_for(1ms) && !rival.try_lock_until(std::chrono::steady_clock::now() - 1s));
        CHECK(!rival.try_lock_until(std::chrono::system_clock::now() + 1ms));
        // Not renewed by somebody else's patience: this very object is in use.
        CHECK(!a.try_lock() && !a.try_lock_for(0s));
    }
    CHECK(a.state() == lock_state::idle && !a.unlock_result());
    {
        std::unique_lock guard(a, 5s);
        CHECK(guard.owns_lock());
        guard.unlock();
        CHECK(is_free(client, "guard:a") && guard.try_lock());
        const std::unique_lock second(rival, std::try_to_lock);
        CHECK(!second.owns_lock());
        const std::unique_lock deferred(b, std::defer_lock);
        CHECK(b.state() == lock_state::idle);
    }
    {
        // Several at once, in whatever order: threads that name them in another one do not deadlock.
        std::vector<std::thread> threads;
        int inside = 0;
        for (int i = 0; i < 4; i++)
            threads.emplace_back([&, i] {
                nblock::lock one(client, "guard:a"), two(client, "guard:b");
                for (int round = 0; round < 20; round++) {
                    if (i % 2) {
                        const std::scoped_lock all(one, two);
                        CHECK(++inside == 1);
                        --inside;
                    } else {
                        const std::scoped_lock all(two, one);
                        CHECK(++inside == 1);
                        --inside;
                    }
                }
            });
        for (auto &thread : threads)
            thread.join();
    }
    CHECK(is_free(client, "guard:a") && is_free(client, "guard:b"));
}

// One object, shared by threads, with a plain number to protect.
static void shared_by_threads(const nblock::client &client)
{
    nblock::lock shared(client, "shared");
    long number = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++)
        threads.emplace_back([&] {
            for (int round = 0; round < 100; round++) {
                const std::lock_guard guard(shared);
                number++;
            }
        });
    for (auto &thread : threads)
        thread.join();
    CHECK(number == 400 && shared.state() == lock_state::idle);
}

static void errors(const nblock::client &client)
{
    nblock::lock lock(client, "errors"), rival(client, "errors", options(std::nullopt, 0ms));
    THROWS(nblock::lock_invalid_op, invalid_op, "not locked", lock.release());
    THROWS(nblock::lock_invalid_op, invalid_op, "not locked", lock.refresh());
    THROWS(nblock::lock_invalid_op, invalid_op, "not locked", lock.remaining());
    THROWS(nblock::lock_invalid_op, invalid_op, "not locked", lock.instance_token());
    lock.unlock();
    CHECK(lock.unlock_result() == nblock::errc::invalid_op && !lock.lost());
    lock.lock();
    CHECK(!lock.unlock_result());
    THROWS(nblock::lock_unavailable, unavailable, "errors", rival.lock());
    THROWS(nblock::lock_unavailable, unavailable, "errors", rival.synchronize([] {}));
    THROWS(nblock::lock_unavailable, unavailable, "errors", lock.lock(options(std::nullopt, 1ms)));
    lock.release();

    THROWS(nblock::error, invalid_argument, "got an empty one", nblock::lock(client, ""));
    THROWS(nblock::error, invalid_argument, "must be UTF-8", nblock::lock(client, "\xff"));
    THROWS(nblock::error, invalid_argument, "expire must be longer than 0, or not set (got 0 ms)",
           nblock::lock(client, "k", options(0ms)));
    THROWS(nblock::error, invalid_argument, "(got -5 ms)", lock.lock(options(-5ms)));
    THROWS(nblock::error, invalid_argument, "366 days", lock.try_lock(options(24h * 367)));
    THROWS(nblock::error, invalid_argument, "timeout must be 0 for a single try, longer, or nblock::forever (got -1 ms)",
           lock.lock(options(1s, -1ms)));
    THROWS(nblock::error, invalid_argument, "owner token", nblock::reentrant_lock(client, "k", ""));
    THROWS(nblock::error, invalid_argument, "has a NUL", nblock::reentrant_lock(client, "k", std::string("a\0b", 3)));
    THROWS(nblock::error, invalid_argument, "no such", nblock::client("no such store"));
    THROWS(nblock::error, invalid_argument, "has a NUL", nblock::client(std::string("memory:\0x", 9)));
    nblock::client_options wrong;
    wrong.op_timeout = 2h;
    THROWS(nblock::error, invalid_argument, "op_timeout", nblock::client("memory:", wrong));
    CHECK(lock.state() == lock_state::idle);
    try {
        nblock::client("memory:", wrong);
    } catch (const std::system_error &caught) {
        CHECK(caught.code() == std::errc::invalid_argument && caught.code().category() == nblock::category());
        CHECK(std::string(caught.code().message()) == "NBL_ERR_INVALID_ARGUMENT");
    }
    const std::string with_nul("key\0key", 7);
    CHECK(nblock::lock(client, with_nul).key() == with_nul);
}

static void loss(const nblock::client &client)
{
    nblock::lock lock(client, "loss", options(60s));
    {
        const std::lock_guard guard(lock);
        break_lock(client, "loss");
    }
    CHECK(lock.lost() && lock.unlock_result() == nblock::errc::lost && lock.state() == lock_state::idle);
    lock.lock();
    CHECK(!lock.lost() && !lock.unlock_result());
    break_lock(client, "loss");
    THROWS(nblock::lost_lock, lost, "loss", lock.refresh());
    CHECK(lock.state() == lock_state::idle && lock.lost());
    // The unlock of a guard comes after that, and changes nothing.
    lock.unlock();
    CHECK(lock.lost() && lock.unlock_result() == nblock::errc::lost);
    lock.lock();
    CHECK(!lock.lost());
    break_lock(client, "loss");
    THROWS(nblock::lost_lock, lost, "loss", lock.release());
    CHECK(lock.lost());
    THROWS(nblock::lost_lock, lost, "loss", lock.synchronize([&] { break_lock(client, "loss"); }));
    THROWS(nblock::lost_lock, lost, "loss", lock.synchronize([&] { return break_lock(client, "loss"), 1; }));

    // A lease that nobody renews runs out, which its descriptor and its state tell.
    lock.lock(options(20ms));
    pollfd overdue{lock.lost_fd(), POLLIN, 0};
    CHECK(poll(&overdue, 1, 10000) == 1 && lock.lost() && !lock.held());
    CHECK(lock.remaining() == 0ms);
    lock.unlock();
    lock.lock();
    CHECK(poll(&overdue, 1, 0) == 0 && lock.remaining() > 30s);
    lock.refresh(24h);
    CHECK(lock.remaining() > 23h && lock.expires_at() > std::chrono::system_clock::now() + 23h);
    lock.release();
}

static void synchronize(const nblock::client &client)
{
    nblock::lock lock(client, "synchronize");
    CHECK(lock.synchronize([&] { return lock.held() ? 42 : 0; }) == 42);
    int number = 1;
    int &same = lock.synchronize([&]() -> int & { return number; });
    CHECK(&same == &number);
    // Results that can only be moved, and bodies that can only be called once.
    auto moved = lock.synchronize([in = std::make_unique<int>(7)]() mutable { return std::move(in); });
    CHECK(*moved == 7 && lock.state() == lock_state::idle);
    try {
        lock.synchronize([] { throw std::runtime_error("the body's"); });
        CHECK(false);
    } catch (const std::runtime_error &caught) {
        CHECK(std::string(caught.what()) == "the body's");
    }
    CHECK(lock.state() == lock_state::idle && is_free(client, "synchronize"));
    lock.synchronize([&] { lock.release(); });
    CHECK(is_free(client, "synchronize"));
}

// Renewed unless an expire was named; a lease that is renewed outlives its expire.
static void renewal(const nblock::client &client)
{
    nblock::lock_options on = options(60ms), off;
    on.auto_refresh = true;
    off.auto_refresh = false;
    nblock::lock renewed(client, "renewed", on);
    renewed.lock();
    const auto until = renewed.expires_at();
    while (std::chrono::system_clock::now() <= until + 100ms)
        std::this_thread::sleep_for(5ms);
    renewed.release();

    nblock::client_options brief;
    brief.expire = 60ms;
    nblock::client second(client.location().find("memory") == std::string::npos ? "embedded:" : "memory:cpp", brief);
    nblock::lock by_default(second, "by default"), named(second, "named", options(60ms));
    nblock::lock not_renewed(second, "off", off);
    by_default.lock();
    named.lock();
    not_renewed.lock();
    nblock::lock named_in_call(second, "named in call");
    named_in_call.lock(options(60ms));
    for (auto *lease : {&named, &not_renewed, &named_in_call}) {
        pollfd overdue{lease->lost_fd(), POLLIN, 0};
        CHECK(poll(&overdue, 1, 10000) == 1);
    }
    by_default.release();
}

static void moves(const nblock::client &client)
{
    nblock::lock first(client, "move:a"), second(client, "move:b");
    first.lock();
    second.lock();
    nblock::lock moved(std::move(first));
    CHECK(moved.held() && moved.key() == "move:a" && !is_free(client, "move:a"));
    // What was moved from holds nothing and harms nothing.
    THROWS(nblock::error, bad_handle, "NULL", first.state());
    THROWS(nblock::error, bad_handle, "NULL", first.held());
    THROWS(nblock::error, bad_handle, "NULL", first.lost());
    first.unlock();
    THROWS(nblock::error, bad_handle, "NULL", first.lock());
    THROWS(nblock::error, resources, "moved from", first.lost_fd());
    // Assigning releases what was held before.
    moved = std::move(second);
    CHECK(is_free(client, "move:a") && moved.held() && moved.key() == "move:b");
    nblock::lock &itself = moved;
    moved = std::move(itself);
    CHECK(moved.held());
    std::swap(first, moved);
    CHECK(first.held() && first.key() == "move:b");
    {
        const nblock::lock at_end(std::move(first));
        CHECK(!is_free(client, "move:b"));
    }
    CHECK(is_free(client, "move:b"));
    {
        std::vector<nblock::lock> many;
        for (int i = 0; i < 20; i++) {
            many.emplace_back(client, "many:" + std::to_string(i));
            many.back().lock();
        }
        for (const auto &one : many)
            CHECK(one.held());
    }
    for (int i = 0; i < 20; i++)
        CHECK(is_free(client, "many:" + std::to_string(i)));
}

static void reentrant(const nblock::client &client)
{
    {
        nblock::reentrant_lock lock(client, "reentrant"), same(client, "reentrant", lock.owner_token());
        nblock::reentrant_lock other(client, "reentrant");
        const std::lock_guard outer(lock);
        {
            const std::lock_guard inner(lock);
            CHECK(client.find("reentrant")->lock_count == 2);
            CHECK(!other.try_lock() && same.try_lock());
            CHECK(client.find("reentrant")->lock_count == 3);
        }
        same.release();
        CHECK(lock.held() && client.find("reentrant")->lock_count == 1);
        CHECK(client.find("reentrant")->damaged.empty());
        lock.lock();
        nblock::reentrant_lock moved(std::move(lock));
        CHECK(moved.held());
        lock = std::move(moved);
        lock.unlock();
    }
    CHECK(is_free(client, "reentrant"));
    {
        nblock::reentrant_lock lock(client, "reentrant", "an owner");
        CHECK(lock.owner_token() == "an owner");
        for (int i = 0; i < 3; i++)
            lock.lock();
    }
    CHECK(is_free(client, "reentrant"));
}

static void closing(const std::string &url)
{
    std::optional<nblock::client> client(url);
    nblock::lock renewed(*client, "closing:a"), lease(*client, "closing:b", options(60s));
    renewed.lock();
    lease.lock();
    client.reset();
    THROWS(nblock::lock_invalid_op, invalid_op, "closed", renewed.lock());
    const nblock::client again(url);
    CHECK(is_free(again, "closing:a"));
    nblock::client moved(url), target(url);
    target = std::move(moved);
    CHECK(target.ping().location == target.location());
    THROWS(nblock::error, bad_handle, "NULL", moved.ping());
    target.close();
    target.close(1s);
    THROWS(nblock::lock_invalid_op, invalid_op, "closed", target.ping());
    CHECK(again.find("closing:b").has_value() || url == "memory:cpp");
    if (!is_free(again, "closing:b"))
        break_lock(again, "closing:b");
}

// A hold is the parent's: the child's copies of its locks, freed there, leave it alone.
static void forked(const nblock::client &client)
{
    auto lock = std::make_unique<nblock::lock>(client, "forked");
    lock->lock();
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        CHECK(lock->state() == lock_state::forked);
        THROWS(nblock::error, forked, "forked", lock->release());
        CHECK(lock->state() == lock_state::idle && !lock->lost());
        lock.reset();
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(lock->held());
    lock->release();
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    const std::string url = argv[1];
    {
        const nblock::client client(url);
        guards(client);
        shared_by_threads(client);
        errors(client);
        loss(client);
        synchronize(client);
        renewal(client);
        moves(client);
        reentrant(client);
        forked(client);
        CHECK(client.list().empty() || url != "memory:cpp");
    }
    closing(url);
}
