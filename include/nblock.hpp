/*
 * nblock for C++17: distributed locks with leases, fencing and loss detection. Header only, over nblock.h.
 *
 *     nblock::client client;                                  // this machine; or a URL
 *     nblock::lock lock(client, "jobs:report");
 *
 *     lock.synchronize([] { report(); });                     // renewed while it runs
 *     std::lock_guard guard(lock);                            // the same
 *     if (std::unique_lock guard(lock, 5s); guard) report();  // waits 5 s at most
 *
 * Conventions
 *
 * Errors are nblock::error, a std::system_error whose code() is one of nblock::errc, or one of its
 * kinds lock_unavailable, lost_lock and lock_invalid_op. Where a function says "throws error", that
 * is for what the store or the arguments are to blame for: unreachable, denied, invalid_argument, ...
 *
 * Objects can be moved, not copied. One that was moved from can only be assigned to or destroyed; all
 * else throws error (bad_handle). Declare the client before its locks: when it is destroyed it closes,
 * and its locks throw lock_invalid_op from then on.
 *
 * Threads. Every function may be called from any thread, on one object from many at once, but for
 * moving, assigning and destroying. Threads that share a lock object take turns on it.
 *
 * Waiting. Functions that ask the store wait for its answer, client_options::op_timeout at most;
 * those that wait longer say so. Every one of them has a _start form, which returns an operation for
 * an event loop. What is marked noexcept and not said to wait returns at once.
 *
 * Renewal. A hold is renewed until it is unlocked, unless an expire was named for the lock or the
 * call: that is a plain lease then, which runs out. lock_options::auto_refresh says it outright.
 *
 * Fork. Clients and idle locks work in a forked child; a hold stays the parent's: see nblock.h.
 */
#ifndef NBLOCK_HPP
#define NBLOCK_HPP

#if !defined(__cplusplus) || __cplusplus < 201703L
#error "nblock.hpp needs C++17"
#endif

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include <poll.h>

#include "nblock.h"

namespace nblock {

/* As a timeout: wait for ever. */
inline constexpr std::chrono::milliseconds forever = std::chrono::milliseconds::max();

/* What went wrong, as error::code() has it; compares with it: e.code() == nblock::errc::unreachable.
 * nblock.h says what each one means. */
enum class errc : int {
    unavailable = NBL_UNAVAILABLE,
    lost = NBL_LOST,
    not_found = NBL_NOT_FOUND,
    cancelled = NBL_CANCELLED,
    overdue = NBL_OVERDUE,
    invalid_op = NBL_ERR_INVALID_OP,
    invalid_argument = NBL_ERR_INVALID_ARGUMENT,
    bad_handle = NBL_ERR_BAD_HANDLE,
    unreachable = NBL_ERR_UNREACHABLE,
    indeterminate = NBL_ERR_INDETERMINATE,
    denied = NBL_ERR_DENIED,
    store = NBL_ERR_STORE,
    forked = NBL_ERR_FORKED,
    internal = NBL_ERR_INTERNAL,
    resources = NBL_ERR_RESOURCES,
};

/* The category of errc's codes. */
inline const std::error_category &category() noexcept
{
    class statuses final : public std::error_category {
        const char *name() const noexcept override { return "nblock"; }
        std::string message(int status) const override { return nbl_status_name(status); }
        std::error_condition default_error_condition(int status) const noexcept override
        {
            switch (status) {
            case NBL_CANCELLED: return std::errc::operation_canceled;
            case NBL_ERR_INVALID_ARGUMENT: return std::errc::invalid_argument;
            case NBL_ERR_DENIED: return std::errc::permission_denied;
            default: return {status, *this};
            }
        }
    };
    static const statuses instance;
    return instance;
}

inline std::error_code make_error_code(errc status) noexcept
{
    return {static_cast<int>(status), category()};
}

} // namespace nblock

template <> struct std::is_error_code_enum<nblock::errc> : std::true_type {};

namespace nblock {

/* Whatever went wrong. what() names the value and says what to do. */
class error : public std::system_error {
  public:
    error(errc status, const std::string &message) : std::system_error(status, message) {}
};

/* The lock was not granted in time. */
class lock_unavailable : public error {
  public:
    using error::error;
};

/* The hold ended without our unlock: somebody else may have held the lock meanwhile. */
class lost_lock : public error {
  public:
    using error::error;
};

/* The call does not fit the state: already locked, not locked, client closed. */
class lock_invalid_op : public error {
  public:
    using error::error;
};

namespace detail {

/* The detail of one call, and what to throw for it. */
class answer {
  public:
    answer() noexcept { detail_.struct_size = sizeof detail_; }
    nbl_error_t *detail() noexcept { return &detail_; }

    [[noreturn]] void raise(nbl_status_t status) const
    {
        const auto code = static_cast<errc>(status);
        switch (status) {
        case NBL_UNAVAILABLE: throw lock_unavailable(code, detail_.message);
        case NBL_LOST: throw lost_lock(code, detail_.message);
        case NBL_ERR_INVALID_OP: throw lock_invalid_op(code, detail_.message);
        default: throw error(code, detail_.message);
        }
    }

  private:
    nbl_error_t detail_{};
};

/* Calls a function of nblock.h with these arguments and the detail; throws unless it answers NBL_OK. */
template <class Function, class... Arguments> void call(Function function, Arguments... arguments)
{
    answer answer;
    if (const nbl_status_t status = function(arguments..., answer.detail()); status != NBL_OK)
        answer.raise(status);
}

/* As call, for what may also answer `no`: false then. */
template <class Function, class... Arguments> bool call_or(nbl_status_t no, Function function, Arguments... arguments)
{
    answer answer;
    const nbl_status_t status = function(arguments..., answer.detail());
    if (status != NBL_OK && status != no)
        answer.raise(status);
    return status == NBL_OK;
}

/* A text that nblock.h copies into a buffer: its size is asked for first. A hold, and with it its
 * token, may change in between: then once more. */
template <class Function, class... Arguments> std::string text(Function function, Arguments... arguments)
{
    std::string text;
    std::size_t needed = 0;
    call(function, arguments..., nullptr, std::size_t{0}, &needed);
    for (;;) {
        text.resize(needed);
        answer answer;
        const nbl_status_t status = function(arguments..., text.data(), text.size(), &needed, answer.detail());
        if (status == NBL_OK) {
            text.resize(needed - 1);
            return text;
        }
        if (status != NBL_ERR_INVALID_ARGUMENT || needed <= text.size())
            answer.raise(status);
    }
}

/* A string that nblock.h takes up to its NUL. */
inline const char *up_to_nul(const std::string &text, const char *what)
{
    if (text.find('\0') != std::string::npos)
        throw error(errc::invalid_argument, std::string(what) + " has a NUL in it");
    return text.c_str();
}

/* A length of time that was named, for a field in which 0 means that none was. */
inline std::int64_t length(const std::optional<std::chrono::milliseconds> &named, const char *what)
{
    if (named && named->count() <= 0)
        throw error(errc::invalid_argument, std::string(what) + " is " + std::to_string(named->count()) +
                                                " ms: it is longer than 0, or is not named");
    return named ? named->count() : 0;
}

inline std::int64_t timeout(const std::optional<std::chrono::milliseconds> &named)
{
    if (!named)
        return 0;
    if (named->count() < 0)
        throw error(errc::invalid_argument, "timeout is " + std::to_string(named->count()) +
                                                " ms: it is 0 for a single try, longer, or nblock::forever");
    return *named == forever ? NBL_FOREVER : named->count() == 0 ? NBL_NO_WAIT : named->count();
}

inline std::int32_t on_or_off(const std::optional<bool> &named, std::int32_t otherwise)
{
    return named == true ? NBL_ON : named == false ? NBL_OFF : otherwise;
}

/* Any length of time in whole milliseconds, not shorter, and forever where these cannot hold it. */
template <class Rep, class Period>
std::chrono::milliseconds whole_milliseconds(const std::chrono::duration<Rep, Period> &length)
{
    const double about = std::chrono::duration<double, std::milli>(length).count();
    if (!(about > 0))
        return std::chrono::milliseconds::zero();
    return about < 9e18 ? std::chrono::ceil<std::chrono::milliseconds>(length) : forever;
}

inline std::chrono::system_clock::time_point wall_time(std::uint64_t ms)
{
    return std::chrono::system_clock::time_point(std::chrono::milliseconds(static_cast<std::int64_t>(ms)));
}

/* A handle of nblock.h that is freed with its owner. */
template <class Handle, nbl_status_t (*Free)(Handle *)> struct freeing {
    void operator()(Handle *handle) const noexcept { Free(handle); }
};
template <class Handle, nbl_status_t (*Free)(Handle *)> using owned = std::unique_ptr<Handle, freeing<Handle, Free>>;

using op_handle = owned<nbl_op_t, nbl_op_free>;

/* What of an operation is the same for all results. */
class operation_base {
  public:
    /* A descriptor that becomes readable when the operation has ended, for poll, epoll or an event
     * loop: get() does not wait then. It is the operation's: do not read or close it. Throws error
     * (resources) when none can be made. */
    int fd() const
    {
        const int descriptor = nbl_op_fd(op_.get());
        if (descriptor < 0)
            throw error(errc::resources, "the operation has no descriptor: it was moved from, or none could be made");
        return descriptor;
    }

    /* Whether the operation has ended. Takes no note of its outcome. */
    bool ready() const { return wait_for(std::chrono::milliseconds::zero()); }

    /* Waits until the operation has ended; false when that was not within the time. */
    template <class Rep, class Period> bool wait_for(const std::chrono::duration<Rep, Period> &length) const
    {
        const auto clock = [] { return std::chrono::steady_clock::now(); };
        const auto start = clock();
        const auto limit = whole_milliseconds(length);
        pollfd look{fd(), POLLIN, 0};
        for (;;) {
            const auto passed = std::chrono::duration_cast<std::chrono::milliseconds>(clock() - start);
            const auto left = limit > passed ? limit - passed : std::chrono::milliseconds::zero();
            const int ready = ::poll(&look, 1, static_cast<int>(left.count() < 60000 ? left.count() : 60000));
            if (ready > 0)
                return true;
            if (ready < 0 && errno != EINTR)
                throw error(errc::resources, "poll: " + std::generic_category().message(errno));
            if (ready == 0 && left.count() < 60000)
                return false;
        }
    }

    /* Gives the operation up: get() throws error (cancelled) then. An acquire is undone, granted or
     * not, if get() has not told of it; an unlock or refresh goes on all the same. */
    void cancel() noexcept { nbl_op_cancel(op_.get()); }

    nbl_op_t *c_handle() const noexcept { return op_.get(); }

  protected:
    explicit operation_base(nbl_op_t *op) noexcept : op_(op) {}

    op_handle op_;
};

} // namespace detail

/* Something under way, which a _start function began. Destroying it cancels it. */
template <class Result> class operation : public detail::operation_base {
  public:
    /* Waits until the operation has ended; returns or throws what the function without _start would
     * have, but that an acquire which was not granted in time returns false. Once. */
    Result get() { return take_(op_.get()); }

  private:
    using taker = Result (*)(nbl_op_t *);

    operation(nbl_op_t *op, taker take) noexcept : operation_base(op), take_(take) {}

    taker take_;

    friend class client;
    friend class record;
    friend class basic_lock;
};

namespace detail {

/* Waits for the end of an operation that has no result but that it went well. */
inline void end(nbl_op_t *op)
{
    call(nbl_op_wait, op, std::int64_t{NBL_FOREVER});
}

/* Begins an operation. */
template <class Function, class... Arguments> nbl_op_t *start(Function function, Arguments... arguments)
{
    nbl_op_t *op = nullptr;
    call(function, arguments..., &op);
    return op;
}

} // namespace detail

/* Options of a client. What is not set is the library's default. */
struct client_options {
    /* How long a lease lasts: 1 ms to 366 days. Default: 60 s. */
    std::optional<std::chrono::milliseconds> expire = std::nullopt;
    /* How long lock() waits: 0 for a single try, or nblock::forever. Default: 10 s. */
    std::optional<std::chrono::milliseconds> timeout = std::nullopt;
    /* Bound of one request to the store, up to an hour. Default: 5 s. */
    std::optional<std::chrono::milliseconds> op_timeout = std::nullopt;
    /* Bound of opening the store, up to an hour. Default: 5 s. */
    std::optional<std::chrono::milliseconds> connect_timeout = std::nullopt;
    /* Shown to whoever lists the locks, at most 255 bytes. Default: the program's name. */
    std::string app = {};
};

/* Options of a lock, or of one call on it. What is not set is what the lock, or its client, has. */
struct lock_options {
    /* How long the lease lasts: 1 ms to 366 days. Naming it turns the renewal off. */
    std::optional<std::chrono::milliseconds> expire = std::nullopt;
    /* How long lock() waits: 0 for a single try, or nblock::forever. */
    std::optional<std::chrono::milliseconds> timeout = std::nullopt;
    /* Whether the hold is renewed, at a third of its expire, until it is unlocked. */
    std::optional<bool> auto_refresh = std::nullopt;
    /* Whether the grant comes with a fence. The embedded store gives one anyway. */
    std::optional<bool> fence = std::nullopt;
};

/* What a lock object is at. */
enum class lock_state {
    idle,
    pending, /* an acquire or unlock is under way */
    held,
    overdue, /* held, but past its deadline: others may take it over at any moment */
    lost,    /* which unlock() or refresh() will tell */
    forked,  /* held by the process that this one was forked from */
};

/* One record of the store, as it was found. */
class record {
  public:
    std::string key;
    /* Base64 of the key's SHA-1, as NoBrainer stores it. */
    std::string key_hash;
    /* Who holds it: host name, boot id of the machine, app name; empty where the record does not say. */
    std::string host, boot_id, app;
    /* The holder's process; 0 where the record does not say. */
    std::uint32_t pid = 0;
    /* How long the lease still runs; negative when it ran out so long ago. */
    std::chrono::milliseconds remaining{};
    /* Whether it has run out. */
    bool expired = false;
    std::chrono::system_clock::time_point expires_at{};
    std::optional<std::chrono::system_clock::time_point> acquired_at = std::nullopt;
    std::optional<std::uint64_t> fence = std::nullopt;
    /* How often a reentrant lock is locked; 0 for a plain one. */
    std::uint32_t reentrant_count = 0;
    /* Identifies this very state of the record: another one after every renewal. Shows no token. */
    std::string version;
    /* What is wrong with the record, if it is damaged; empty for a sound one. A damaged record is never granted: its
     * other fields may be empty, and key may be a placeholder. */
    std::string damaged;

    /* Deletes the record by force, if it still is as it was found; false when it is not. To break one
     * hold and no other, compare fence, host and pid, or version first. Its holder finds its hold lost.
     * Throws error. */
    bool break_by_force() const
    {
        return detail::call_or(NBL_NOT_FOUND, nbl_break, list_.get(), index_);
    }

    operation<bool> break_by_force_start() const
    {
        return {detail::start(nbl_break_start, list_.get(), index_), [](nbl_op_t *op) {
                    return detail::call_or(NBL_NOT_FOUND, nbl_op_wait, op, std::int64_t{NBL_FOREVER});
                }};
    }

  private:
    record(std::shared_ptr<nbl_list_t> list, std::size_t index) : list_(std::move(list)), index_(index)
    {
        nbl_record_t facts{};
        facts.struct_size = sizeof facts;
        detail::call(nbl_list_record, list_.get(), index_, &facts);
        key = text(NBL_TEXT_KEY);
        key_hash = text(NBL_TEXT_KEY_HASH);
        host = text(NBL_TEXT_HOST);
        boot_id = text(NBL_TEXT_BOOT_ID);
        app = text(NBL_TEXT_APP);
        version = text(NBL_TEXT_VERSION);
        damaged = text(NBL_TEXT_DAMAGED);
        pid = facts.pid;
        remaining = std::chrono::milliseconds(facts.remaining_ms);
        expired = facts.expired != 0;
        expires_at = detail::wall_time(facts.expires_at_ms);
        if (facts.acquired_at_ms != 0)
            acquired_at = detail::wall_time(facts.acquired_at_ms);
        if (facts.fence != 0)
            fence = facts.fence;
        reentrant_count = facts.reentrant_count;
    }

    std::string text(std::int32_t field) const { return detail::text(nbl_list_text, list_.get(), index_, field); }

    std::shared_ptr<nbl_list_t> list_;
    std::size_t index_;

    friend class records;
};

/* Records, as they were found: a range of record, read when it is looked at. */
class records {
  public:
    class iterator {
      public:
        using iterator_category = std::input_iterator_tag;
        using value_type = record;
        using difference_type = std::ptrdiff_t;
        using pointer = void;
        using reference = record;

        record operator*() const { return record(list_, index_); }
        iterator &operator++() noexcept
        {
            ++index_;
            return *this;
        }
        iterator operator++(int) noexcept
        {
            iterator before = *this;
            ++index_;
            return before;
        }
        friend bool operator==(const iterator &a, const iterator &b) noexcept { return a.index_ == b.index_; }
        friend bool operator!=(const iterator &a, const iterator &b) noexcept { return a.index_ != b.index_; }

      private:
        iterator(std::shared_ptr<nbl_list_t> list, std::size_t index) noexcept : list_(std::move(list)), index_(index)
        {
        }

        std::shared_ptr<nbl_list_t> list_;
        std::size_t index_;

        friend class records;
    };
    using const_iterator = iterator;
    using value_type = record;

    std::size_t size() const noexcept { return size_; }
    bool empty() const noexcept { return size_ == 0; }
    iterator begin() const noexcept { return {list_, 0}; }
    iterator end() const noexcept { return {list_, size_}; }
    /* Throws error (invalid_argument) beyond the last one. */
    record operator[](std::size_t index) const { return record(list_, index); }

  private:
    explicit records(nbl_list_t *list) : list_(list, nbl_list_free) { detail::call(nbl_list_length, list, &size_); }

    std::shared_ptr<nbl_list_t> list_;
    std::size_t size_ = 0;

    friend class client;
};

/* An open store plus default options. */
class client {
  public:
    /* Opens a store: "embedded:", "embedded:/directory", "memory:", "memory:name", "rethinkdb://...".
     * Without a URL: what NBLOCK_URL says, else NoBrainer's environment, else "embedded:". Waits
     * client_options::connect_timeout at most. Throws error. */
    explicit client(const client_options &options = {}) : client(nullptr, options) {}
    explicit client(const std::string &url, const client_options &options = {})
        : client(detail::up_to_nul(url, "url"), options)
    {
    }
    explicit client(const char *url, const client_options &options = {})
    {
        const nbl_client_options_t given = c_options(options);
        nbl_client_t *opened = nullptr;
        detail::call(nbl_client_new, url, &given, &opened);
        client_.reset(opened);
    }

    static operation<client> open_start(const std::string &url, const client_options &options = {})
    {
        const nbl_client_options_t given = c_options(options);
        return {detail::start(nbl_client_start, detail::up_to_nul(url, "url"), &given), [](nbl_op_t *op) {
                    detail::end(op);
                    nbl_client_t *opened = nullptr;
                    detail::call(nbl_op_take_client, op, &opened);
                    return client(opened);
                }};
    }

    /* Closes: waits of its locks end as cancelled, renewed holds are released, others run out. Waits
     * for the store to take the releases, for that long or op_timeout; throws error (indeterminate) when
     * that was not long enough. Closing again is no error. */
    void close(std::optional<std::chrono::milliseconds> timeout = std::nullopt)
    {
        detail::call(nbl_client_close, client_.get(), detail::timeout(timeout));
    }

    /* Where the store is, for people to read, without any password. */
    std::string location() const { return detail::text(nbl_client_location, client_.get()); }

    /* Asks the store for a sign of life. Throws error. */
    void ping() const { detail::call(nbl_ping, client_.get()); }
    operation<void> ping_start() const { return {detail::start(nbl_ping_start, client_.get()), detail::end}; }

    /* The records there are. Throws error. */
    records list() const { return list(NBL_LIST_ALL); }
    operation<records> list_start() const { return list_start(NBL_LIST_ALL); }

    /* The records whose lease has run out. Throws error. */
    records expired() const { return list(NBL_LIST_EXPIRED); }
    operation<records> expired_start() const { return list_start(NBL_LIST_EXPIRED); }

    /* The record of a key; nothing when nobody has locked it. Throws error. */
    std::optional<record> find(std::string_view key) const
    {
        nbl_list_t *found = nullptr;
        if (!detail::call_or(NBL_NOT_FOUND, nbl_find, client_.get(), key.data(), key.size(), &found))
            return std::nullopt;
        return records(found)[0];
    }

    operation<std::optional<record>> find_start(std::string_view key) const
    {
        return {detail::start(nbl_find_start, client_.get(), key.data(), key.size()),
                [](nbl_op_t *op) -> std::optional<record> {
                    if (!detail::call_or(NBL_NOT_FOUND, nbl_op_wait, op, std::int64_t{NBL_FOREVER}))
                        return std::nullopt;
                    return taken(op)[0];
                }};
    }

    nbl_client_t *c_handle() const noexcept { return client_.get(); }

  private:
    /* Closes first: waits op_timeout at most. */
    struct closing {
        void operator()(nbl_client_t *client) const noexcept
        {
            nbl_client_close(client, 0, nullptr);
            nbl_client_free(client);
        }
    };

    explicit client(nbl_client_t *opened) noexcept : client_(opened) {}

    static nbl_client_options_t c_options(const client_options &options)
    {
        if (nbl_abi_version() < NBL_ABI_VERSION)
            throw error(errc::internal, "the libnblock that was loaded, " + std::string(nbl_version()) +
                                            ", is older than the header that this program was built with");
        nbl_client_options_t given{};
        given.struct_size = sizeof given;
        given.expire_ms = detail::length(options.expire, "expire");
        given.timeout_ms = detail::timeout(options.timeout);
        given.op_timeout_ms = detail::length(options.op_timeout, "op_timeout");
        given.connect_timeout_ms = detail::length(options.connect_timeout, "connect_timeout");
        given.app = options.app.empty() ? nullptr : detail::up_to_nul(options.app, "app");
        return given;
    }

    records list(std::int32_t filter) const
    {
        const nbl_list_options_t options{sizeof options, filter};
        nbl_list_t *found = nullptr;
        detail::call(nbl_list, client_.get(), &options, &found);
        return records(found);
    }

    operation<records> list_start(std::int32_t filter) const
    {
        const nbl_list_options_t options{sizeof options, filter};
        return {detail::start(nbl_list_start, client_.get(), &options), [](nbl_op_t *op) {
                    detail::end(op);
                    return taken(op);
                }};
    }

    static records taken(nbl_op_t *op)
    {
        nbl_list_t *found = nullptr;
        detail::call(nbl_op_take_list, op, &found);
        return records(found);
    }

    std::unique_ptr<nbl_client_t, closing> client_;
};

/* What plain and reentrant locks have in common: TimedLockable, and what a lease adds to it. */
class basic_lock {
  public:
    basic_lock(const basic_lock &) = delete;
    basic_lock &operator=(const basic_lock &) = delete;

    /* Takes the lock; waits the timeout at most (default 10 s). Throws lock_unavailable when it was not
     * granted in time, error. */
    void lock()
    {
        detail::call(nbl_lock, lock_.get(), nullptr);
        last_unlock_ = NBL_OK;
    }
    void lock(const lock_options &options)
    {
        const nbl_lock_options_t given = c_options(options, 0);
        detail::call(nbl_lock, lock_.get(), &given);
        last_unlock_ = NBL_OK;
    }

    /* Tries once. Throws error. */
    bool try_lock() { return granted(nbl_try_lock, nullptr); }
    bool try_lock(const lock_options &options)
    {
        const nbl_lock_options_t given = c_options(options, 0);
        return granted(nbl_try_lock, &given);
    }

    /* Waits for the lock, for that long at most. Throws error. */
    template <class Rep, class Period> bool try_lock_for(const std::chrono::duration<Rep, Period> &timeout)
    {
        lock_options options;
        options.timeout = detail::whole_milliseconds(timeout);
        const nbl_lock_options_t given = c_options(options, 0);
        return granted(nbl_lock, &given);
    }

    /* Waits for the lock, up to that moment. Throws error. */
    template <class Clock, class Duration> bool try_lock_until(const std::chrono::time_point<Clock, Duration> &limit)
    {
        /* The clock may be set while we wait. */
        while (!try_lock_for(limit - Clock::now()))
            if (Clock::now() >= limit)
                return false;
        return true;
    }

    operation<bool> lock_start(const lock_options &options = {})
    {
        const nbl_lock_options_t given = c_options(options, 0);
        nbl_op_t *op = detail::start(nbl_lock_start, lock_.get(), &given);
        last_unlock_ = NBL_OK;
        return {op, [](nbl_op_t *started) {
                    return detail::call_or(NBL_UNAVAILABLE, nbl_op_wait, started, std::int64_t{NBL_FOREVER});
                }};
    }

    /* Gives the hold back, for guards, and notes what came of it: see lost() and unlock_result(). Asks
     * the store, and waits for its answer. */
    void unlock() noexcept { last_unlock_ = nbl_unlock(lock_.get(), nullptr); }

    /* As unlock, and throws lost_lock when the hold was not ours any more, lock_invalid_op when there is
     * none, error (indeterminate) when no answer came: then it goes on in the background. */
    void release()
    {
        detail::answer answer;
        last_unlock_ = nbl_unlock(lock_.get(), answer.detail());
        if (last_unlock_ != NBL_OK)
            answer.raise(last_unlock_);
    }

    /* As release; what lost() says is not changed by it. Cancelled or destroyed, it goes on. */
    operation<void> unlock_start() { return {detail::start(nbl_unlock_start, lock_.get()), detail::end}; }

    /* Whether the hold is lost or overdue, so that somebody else may hold the lock; or, when the lock is
     * idle, whether the last unlock found it lost. */
    bool lost() const noexcept
    {
        const lock_state now = state();
        return now == lock_state::lost || now == lock_state::overdue || last_unlock_ == NBL_LOST;
    }

    /* What came of the last unlock() or release(): no error, or one of errc. */
    std::error_code unlock_result() const noexcept
    {
        const nbl_status_t last = last_unlock_;
        return last == NBL_OK ? std::error_code() : make_error_code(static_cast<errc>(last));
    }

    /* Locks, calls the body, unlocks, and returns what the body did. Throws as lock() and release() do,
     * or what the body threw: then the lock is unlocked, as unlock() does. A body may unlock the lock
     * itself, where no other thread uses the object. */
    template <class Body> std::invoke_result_t<Body> synchronize(Body &&body, const lock_options &options = {})
    {
        lock(options);
        struct unlocking {
            basic_lock *of;
            ~unlocking()
            {
                if (of)
                    of->unlock();
            }
        } at_throw{this};
        const auto leave = [&] {
            at_throw.of = nullptr;
            if (state() != lock_state::idle)
                release();
        };
        if constexpr (std::is_void_v<std::invoke_result_t<Body>>) {
            std::invoke(std::forward<Body>(body));
            leave();
        } else {
            std::invoke_result_t<Body> result = std::invoke(std::forward<Body>(body));
            leave();
            return std::forward<std::invoke_result_t<Body>>(result);
        }
    }

    /* Renews the hold: its lease ends that long from now, or as long as last time. Never takes the
     * lock anew. Throws lost_lock, lock_invalid_op, error (indeterminate: the hold is as it was). */
    void refresh(std::optional<std::chrono::milliseconds> expire = std::nullopt)
    {
        const nbl_lock_options_t given = refreshing(expire);
        detail::call(nbl_refresh, lock_.get(), &given);
    }

    operation<void> refresh_start(std::optional<std::chrono::milliseconds> expire = std::nullopt)
    {
        const nbl_lock_options_t given = refreshing(expire);
        return {detail::start(nbl_refresh_start, lock_.get(), &given), detail::end};
    }

    lock_state state() const noexcept
    {
        switch (nbl_lock_state(lock_.get())) {
        case NBL_OK: return lock_state::held;
        case NBL_OVERDUE: return lock_state::overdue;
        case NBL_LOST: return lock_state::lost;
        case NBL_PENDING: return lock_state::pending;
        case NBL_ERR_FORKED: return lock_state::forked;
        default: return lock_state::idle;
        }
    }

    /* Whether the hold is ours now. */
    bool held() const noexcept { return state() == lock_state::held; }

    /* How long the hold is certainly ours; 0 when it is overdue. Throws lock_invalid_op, lost_lock. Does
     * not wait. */
    std::chrono::milliseconds remaining() const
    {
        return std::chrono::milliseconds(static_cast<std::int64_t>(number(nbl_lock_remaining_ms)));
    }

    /* When the lease ends, for people to read. Throws lock_invalid_op, lost_lock. Does not wait. */
    std::chrono::system_clock::time_point expires_at() const
    {
        return detail::wall_time(number(nbl_lock_expires_at_ms));
    }

    /* The fence of the hold, a number that grows with every grant of this key. Where the grant brought
     * none it is asked for now: waits 2 * op_timeout at most. Throws lock_invalid_op, lost_lock, error. */
    std::uint64_t fence() const { return number(nbl_lock_fence); }

    operation<std::uint64_t> fence_start() const
    {
        return {detail::start(nbl_fence_start, lock_.get()), [](nbl_op_t *op) {
                    detail::end(op);
                    std::uint64_t fence = 0;
                    detail::call(nbl_op_fence, op, &fence);
                    return fence;
                }};
    }

    /* A descriptor that is readable while the hold is overdue or lost. It is the lock's: do not read or
     * close it. Throws error (resources) when none can be made. */
    int lost_fd() const
    {
        const int descriptor = nbl_lock_lost_fd(lock_.get());
        if (descriptor < 0)
            throw error(errc::resources, "the lock has no descriptor: it was moved from, or none could be made");
        return descriptor;
    }

    std::string key() const { return text(NBL_TEXT_KEY); }
    /* Base64 of the key's SHA-1, as NoBrainer stores it. */
    std::string key_hash() const { return text(NBL_TEXT_KEY_HASH); }
    /* What proves the hold: whoever has it can end it. Throws lock_invalid_op. */
    std::string instance_token() const { return text(NBL_TEXT_INSTANCE_TOKEN); }

    nbl_lock_t *c_handle() const noexcept { return lock_.get(); }

  protected:
    explicit basic_lock(nbl_lock_t *lock) noexcept : lock_(lock) {}
    basic_lock(basic_lock &&other) noexcept : lock_(std::move(other.lock_)), last_unlock_(other.last_unlock_.load()) {}
    basic_lock &operator=(basic_lock &&other) noexcept
    {
        lock_ = std::move(other.lock_);
        last_unlock_ = other.last_unlock_.load();
        return *this;
    }
    ~basic_lock() = default;

    /* The options for nblock.h; renewal, where nothing was said of it and no expire was named. */
    static nbl_lock_options_t c_options(const lock_options &options, std::int32_t renewal)
    {
        nbl_lock_options_t given{};
        given.struct_size = sizeof given;
        given.auto_refresh = detail::on_or_off(options.auto_refresh, options.expire ? NBL_OFF : renewal);
        given.expire_ms = detail::length(options.expire, "expire");
        given.timeout_ms = detail::timeout(options.timeout);
        given.if_held = NBL_IF_HELD_WAIT;
        given.fence = detail::on_or_off(options.fence, 0);
        return given;
    }

    std::string text(std::int32_t field) const { return detail::text(nbl_lock_text, lock_.get(), field); }

  private:
    /* Unlocks what is held, as often as it was locked, and frees: a hold does not leak. */
    struct releasing {
        void operator()(nbl_lock_t *lock) const noexcept
        {
            const auto holds = [lock] {
                const nbl_status_t state = nbl_lock_state(lock);
                return state == NBL_OK || state == NBL_OVERDUE;
            };
            while (holds() && nbl_unlock(lock, nullptr) == NBL_OK) {
            }
            nbl_lock_free(lock);
        }
    };

    template <class Function> bool granted(Function function, const nbl_lock_options_t *options)
    {
        if (!detail::call_or(NBL_UNAVAILABLE, function, lock_.get(), options))
            return false;
        last_unlock_ = NBL_OK;
        return true;
    }

    template <class Function> std::uint64_t number(Function function) const
    {
        std::uint64_t number = 0;
        detail::call(function, lock_.get(), &number);
        return number;
    }

    static nbl_lock_options_t refreshing(const std::optional<std::chrono::milliseconds> &expire)
    {
        nbl_lock_options_t given{};
        given.struct_size = sizeof given;
        given.expire_ms = detail::length(expire, "expire");
        return given;
    }

    std::unique_ptr<nbl_lock_t, releasing> lock_;
    std::atomic<nbl_status_t> last_unlock_{NBL_OK};
};

/* The lock on one key, for one holder: a TimedLockable, for std::lock_guard, std::unique_lock and
 * std::scoped_lock. Its name is nblock::lock.
 *
 * Threads that share one take turns on it, and locking it again in the thread that holds it waits for
 * that thread: in vain. Destroying it releases what it holds, and waits for the store's answer. */
class plain_lock : public basic_lock {
  public:
    /* A lock object for a key of 1 byte to 1 MiB of UTF-8. Takes nothing yet, and does not wait. Throws
     * error (invalid_argument), lock_invalid_op. */
    plain_lock(const client &client, std::string_view key, const lock_options &defaults = {})
        : basic_lock(make(client, key, defaults))
    {
    }

  private:
    static nbl_lock_t *make(const client &client, std::string_view key, const lock_options &defaults)
    {
        const nbl_lock_options_t given = c_options(defaults, NBL_ON);
        nbl_lock_t *made = nullptr;
        detail::call(nbl_lock_new, client.c_handle(), key.data(), key.size(), &given, &made);
        return made;
    }
};

/* A class cannot have a member function of its own name: this is plain_lock's name for all to use. */
using lock = plain_lock;

/* A lock that whoever presents its owner token may lock again, from this object, another one or another
 * process; the last unlock gives it back. Otherwise as lock. */
class reentrant_lock : public basic_lock {
  public:
    /* owner_token: 1 to 255 bytes of UTF-8; nothing: random. Throws as lock's does. */
    reentrant_lock(const client &client, std::string_view key,
                   const std::optional<std::string> &owner_token = std::nullopt, const lock_options &defaults = {})
        : basic_lock(make(client, key, owner_token, defaults))
    {
    }

    std::string owner_token() const { return text(NBL_TEXT_OWNER_TOKEN); }

  private:
    static nbl_lock_t *make(const client &client, std::string_view key, const std::optional<std::string> &owner_token,
                            const lock_options &defaults)
    {
        const nbl_lock_options_t given = c_options(defaults, NBL_ON);
        const char *owner = owner_token ? detail::up_to_nul(*owner_token, "owner token") : nullptr;
        nbl_lock_t *made = nullptr;
        detail::call(nbl_reentrant_lock_new, client.c_handle(), key.data(), key.size(), owner, &given, &made);
        return made;
    }
};

/* How much is logged. */
enum class log_level : std::int32_t {
    error = NBL_LOG_ERROR,
    warn = NBL_LOG_WARN,
    info = NBL_LOG_INFO,
    debug = NBL_LOG_DEBUG,
    trace = NBL_LOG_TRACE,
};

/* Takes a line of the log, which is valid during the call. */
using log_function = std::function<void(log_level, std::string_view)>;

/* Has a function called with every line that is logged, up to a level; an empty one: no more. It runs on
 * a thread of the library's, one line at a time; what it throws is dropped, and functions of nblock
 * throw lock_invalid_op inside it. Waits for a call that is running. Throws error. */
inline void set_log(log_function function, log_level level = log_level::info)
{
    static std::mutex setting;
    /* Never destroyed at exit: a line may still be on its way then. */
    static log_function *current = nullptr;
    const std::lock_guard<std::mutex> guard(setting);
    std::unique_ptr<log_function> next;
    nbl_log_fn callback = nullptr;
    if (function) {
        next = std::make_unique<log_function>(std::move(function));
        callback = [](std::int32_t number, const char *line, void *user) {
            try {
                (*static_cast<log_function *>(user))(static_cast<log_level>(number), line);
            } catch (...) {
            }
        };
    }
    const nbl_status_t status = nbl_set_log(callback, next.get(), static_cast<std::int32_t>(level));
    if (status != NBL_OK)
        detail::answer().raise(status);
    delete std::exchange(current, next.release());
}

} // namespace nblock

#endif
