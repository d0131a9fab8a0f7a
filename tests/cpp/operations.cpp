// Operations in an event loop, records as a range, and the log. Argument: the URL of a store.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <thread>
#include <typeinfo>
#include <vector>

#include <sys/epoll.h>
#include <unistd.h>

#include "check.hpp"

using namespace std::chrono_literals;
using nblock::lock_state;

// Many acquires of one key in one thread: each is granted in its turn.
static void in_an_event_loop(const nblock::client &client)
{
    constexpr int waiters = 10;
    std::vector<nblock::lock> locks;
    std::vector<nblock::operation<bool>> operations;
    nblock::lock_options patient;
    patient.timeout = nblock::forever;
    for (int i = 0; i < waiters; i++) {
        locks.emplace_back(client, "loop", patient);
        operations.push_back(locks.back().lock_start());
    }
    const int loop = epoll_create1(EPOLL_CLOEXEC);
    CHECK(loop >= 0);
    for (int i = 0; i < waiters; i++) {
        epoll_event wanted{};
        wanted.events = EPOLLIN;
        wanted.data.u32 = static_cast<std::uint32_t>(i);
        const auto which = static_cast<std::size_t>(i);
        CHECK(epoll_ctl(loop, EPOLL_CTL_ADD, operations[which].fd(), &wanted) == 0);
    }
    for (std::uint32_t granted = 0; granted < waiters; granted++) {
        epoll_event event{};
        CHECK(epoll_wait(loop, &event, 1, 10000) == 1);
        CHECK(event.data.u32 == granted);
        CHECK(operations[granted].ready() && operations[granted].get());
        CHECK(epoll_ctl(loop, EPOLL_CTL_DEL, operations[granted].fd(), nullptr) == 0);
        CHECK(locks[granted].held());
        locks[granted].unlock_start().get();
    }
    CHECK(close(loop) == 0 && is_free(client, "loop"));
}

static void outcomes(const nblock::client &client)
{
    nblock::lock lock(client, "op"), rival(client, "op");
    nblock::lock_options once;
    once.timeout = 0ms;
    CHECK(lock.lock_start().get());
    CHECK(!rival.lock_start(once).get());
    CHECK(lock.fence_start().get() == lock.fence());
    CHECK(nblock::client::open_start().get().location() == nblock::client().location());
    CHECK(nblock::reentrant_lock(client, "op", once).owner_token() != nblock::reentrant_lock(client, "op", once).owner_token());
    const nblock::ping ping = client.ping(), started = client.ping_start().get();
    CHECK(ping.location == client.location() && !ping.server.empty());
    CHECK(started.server == ping.server && started.location == ping.location && !ping.skew && ping.caveats.empty());
    CHECK(ping.round_trip < 1min);
    lock.refresh_start(10s).get();
    CHECK(lock.remaining() <= 10s);

    // Cancelled, dropped, and dropped after the grant but before get(): nothing stays behind.
    auto waiting = rival.lock_start();
    CHECK(!waiting.ready() && !waiting.wait_for(1ms) && rival.state() == lock_state::pending);
    waiting.cancel();
    THROWS(nblock::error, cancelled, "cancelled", waiting.get());
    CHECK(rival.state() == lock_state::idle);
    {
        const auto dropped = rival.lock_start();
    }
    CHECK(rival.state() == lock_state::idle);
    {
        auto granted = rival.lock_start();
        lock.release();
        CHECK(granted.wait_for(10s));
    }
    // It is given back in the background: the next caller waits for that.
    lock.lock();
    nblock::operation<void> unlocking = lock.unlock_start();
    nblock::operation<void> moved(std::move(unlocking));
    THROWS(nblock::error, bad_handle, "NULL", unlocking.get());
    THROWS(nblock::error, resources, "moved from", unlocking.ready());
    moved.get();
    THROWS(nblock::lock_invalid_op, invalid_op, "not locked", lock.unlock_start().get());
    THROWS(nblock::error, invalid_argument, "expire", lock.refresh_start(0ms));

    nblock::client opened = nblock::client::open_start("memory:").get();
    opened.ping_start().get();
    CHECK(opened.list_start().get().empty() && !opened.find_start("nobody").get());
    THROWS(nblock::error, invalid_argument, "", nblock::client::open_start("nonsense").get());
}

static void inspection(const nblock::client &client)
{
    std::vector<nblock::lock> locks;
    nblock::lock_options lease;
    lease.expire = 60s;
    for (const char *key : {"seen:a", "seen:b", "seen:c"}) {
        locks.emplace_back(client, key, lease);
        locks.back().lock();
    }
    std::map<std::string, nblock::record> seen;
    for (const nblock::record &record : client.list())
        seen.emplace(record.key, record);
    for (const nblock::lock &lock : locks) {
        const nblock::record &record = seen.at(lock.key());
        CHECK(record.key_hash == lock.key_hash() && record.pid == static_cast<std::uint32_t>(getpid()));
        CHECK(!record.host.empty() && !record.boot_id.empty() && record.app == "a C++ test");
        CHECK(record.remaining > 0s && record.remaining <= 60s && !record.expired && record.lock_count == 0 && !record.foreign);
        CHECK(record.acquired_at && *record.acquired_at <= std::chrono::system_clock::now() + 1s);
        CHECK(record.expires_at > *record.acquired_at);
        CHECK(!record.fence || *record.fence == lock.fence());
    }
    const nblock::records list = client.list();
    CHECK(list.size() >= 3 && std::distance(list.begin(), list.end()) == static_cast<std::ptrdiff_t>(list.size()));
    CHECK(std::any_of(list.begin(), list.end(), [](const nblock::record &record) { return record.key == "seen:b"; }));
    THROWS(nblock::error, invalid_argument, "index", list[list.size()]);
    CHECK(!client.find("nobody has locked this"));

    // Broken if it is as it was read; an error if it is not.
    const nblock::record before = *client.find("seen:a");
    CHECK(before.version.size() == 16 && client.find("seen:a")->version == before.version);
    locks[0].refresh(50s);
    CHECK(client.find("seen:a")->version != before.version);
    CHECK(!before.break_() && !before.break_start().get());
    CHECK(client.find("seen:a")->break_start().get());
    locks[0].unlock();
    CHECK(locks[0].lost());

    nblock::lock_options brief;
    brief.expire = 1ms;
    locks[1].release();
    locks[1].lock(brief);
    while (!client.find("seen:b")->expired)
        std::this_thread::sleep_for(1ms);
    // Records outlive the list they came from.
    std::optional<nblock::record> kept;
    for (const nblock::record &record : client.expired()) {
        CHECK(record.expired && record.remaining <= 0s && record.key != "seen:c");
        if (record.key == "seen:b")
            kept = record;
    }
    CHECK(client.expired_start().get().size() >= 1);
    CHECK(kept && kept->break_());
}

static void log(const std::string &url)
{
    std::mutex mutex;
    std::vector<std::string> lines;
    std::atomic<bool> refused = false;
    nblock::set_log(
        [&](nblock::log_level level, std::string_view line) {
            CHECK(level <= nblock::log_level::info);
            try {
                nblock::client inside(url);
            } catch (const nblock::lock_invalid_op &) {
                refused = true;
            }
            const std::lock_guard guard(mutex);
            lines.emplace_back(line);
            throw std::runtime_error("dropped");
        });
    const nblock::client client(url);
    while (!refused)
        std::this_thread::sleep_for(1ms);
    nblock::set_log([](nblock::log_level, std::string_view) {}, nblock::log_level::error);
    nblock::set_log(nullptr);
    CHECK(!lines.empty());
    const std::size_t count = lines.size();
    const nblock::client another(url);
    CHECK(lines.size() == count);
    THROWS(nblock::error, invalid_argument, "", nblock::set_log([](auto, auto) {}, static_cast<nblock::log_level>(9)));
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    {
        nblock::client_options named;
        named.app = "a C++ test";
        const nblock::client client(argv[1], named);
        in_an_event_loop(client);
        outcomes(client);
        inspection(client);
    }
    log(argv[1]);
}
