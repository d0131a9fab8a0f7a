/**
 * @file
 * nblock for C++17: distributed locks with leases, fencing and loss detection. Header only, over nblock.h.
 *
 *     nblock::client client;                                  // this machine; or a URL
 *     nblock::lock lock(client, "jobs:report");
 *
 *     lock.synchronize([] { report(); });                     // renewed while it runs
 *     if (std::unique_lock guard(lock, 5s); guard) report();  // waits 5 s at most; renewed too
 *     {
 *         std::lock_guard guard(lock);
 *         report();
 *     }
 *     if (lock.unlock_result()) ...                           // a guard cannot throw when it unlocks
 *
 * Conventions
 *
 * Errors are thrown as nblock::error, a std::system_error whose code() is one of nblock::errc, or as one of
 * its subclasses lock_unavailable, lost_lock and lock_invalid_op. "Throws error" at a function means an
 * error that the store or the arguments cause: unreachable, denied, invalid_argument, ...
 *
 * Objects can be moved, but not copied. An object that was moved from can only be assigned to or destroyed;
 * everything else throws error (bad_handle). Declare the client before its locks: its destructor closes it,
 * and its locks throw lock_invalid_op from then on. All handles are freed by the destructors.
 *
 * Threads. Every function may be called from any thread, and on one object from many threads at once,
 * except moving, assigning and destroying. Threads that share a lock object take turns on it.
 *
 * Waiting. Functions that ask the store wait for its reply, at most client_options::op_timeout; those that
 * wait longer say so. Most of them have a form that does not wait, and returns an operation for an event loop:
 * lock_start (with a timeout of 0 it is try_lock), unlock_start (for release), refresh_start, fence_start,
 * client::open_start, ping_start, ... (close has none). Functions that are noexcept, and do not say that they
 * wait, return at once.
 *
 * Renewal. A hold is renewed until it is unlocked, unless the lock or the call sets an expire: then it is a
 * plain lease, which runs out. lock_options::auto_refresh sets this explicitly.
 *
 * Fork. Clients and idle locks work in a forked child; a hold stays with the parent: see nblock.h.
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

/** As a timeout: wait forever. */
inline constexpr std::chrono::milliseconds forever = std::chrono::milliseconds::max();

/** The values of error::code(), which can be compared with them: e.code() == nblock::errc::unreachable.
 * nblock.h says what each one means. */
enum class errc : int {
    unavailable = NBL_UNAVAILABLE,
    lost = NBL_LOST,
    not_found = NBL_NOT_FOUND,
    cancelled = NBL_CANCELLED,
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
    buffer_too_small = NBL_ERR_BUFFER_TOO_SMALL,
};

/** The category of errc's codes. */
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

/** Makes the std::error_code of a status. */
inline std::error_code make_error_code(errc status) noexcept
{
    return {static_cast<int>(status), category()};
}

} // namespace nblock

/** @cond */
template <> struct std::is_error_code_enum<nblock::errc> : std::true_type {};
/** @endcond */

namespace nblock {

/** The base of all errors of this library. what() names the wrong value and says what to do. */
class error : public std::system_error {
  public:
    /** Made by the library; a program may throw its own, in a test for example. */
    error(errc status, const std::string &message) : std::system_error(status, message) {}
};

/** The lock was not granted in time. */
class lock_unavailable : public error {
  public:
    using error::error;
};

/** The hold ended without our unlock: another holder may have had the lock meanwhile. */
class lost_lock : public error {
  public:
    using error::error;
};

/** The call does not fit the state: already locked, not locked, client closed. */
class lock_invalid_op : public error {
  public:
    using error::error;
};

namespace detail {

/** The error detail of one call; raise() throws the exception for it. */
class answer {
  public:
    answer() noexcept
    {
        detail_.struct_size = sizeof detail_;
        detail_.message[0] = '\0';
    }
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
    nbl_error_t detail_; /* large, so not all of it is set to zero for each call */
};

/** Calls a function of nblock.h with these arguments and an error detail; throws unless it returns NBL_OK. */
template <class Function, class... Arguments> void call(Function function, Arguments... arguments)
{
    answer answer;
    if (const nbl_status_t status = function(arguments..., answer.detail()); status != NBL_OK)
        answer.raise(status);
}

/** As call, for a function that may also return `no`: then the result is false. */
template <class Function, class... Arguments> bool call_or(nbl_status_t no, Function function, Arguments... arguments)
{
    answer answer;
    const nbl_status_t status = function(arguments..., answer.detail());
    if (status != NBL_OK && status != no)
        answer.raise(status);
    return status == NBL_OK;
}

/** A text that nblock.h copies into a buffer: the first call gets its size. If the text becomes longer in
 * between (a new hold has a new token), this tries again. */
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
        if (status != NBL_ERR_BUFFER_TOO_SMALL)
            answer.raise(status);
    }
}

/** A string for a NUL-terminated parameter of nblock.h; throws if it contains a NUL. */
inline const char *up_to_nul(const std::string &text, const char *what)
{
    if (text.find('\0') != std::string::npos)
        throw error(errc::invalid_argument, std::string(what) + " has a NUL in it");
    return text.c_str();
}

/** A duration for a field of nblock.h, where 0 means "not set". */
inline std::int64_t length(const std::optional<std::chrono::milliseconds> &named, const char *what)
{
    if (named && named->count() <= 0)
        throw error(errc::invalid_argument, std::string(what) + " must be longer than 0, or not set (got " +
                                                std::to_string(named->count()) + " ms)");
    return named ? named->count() : 0;
}

/** A time to wait for nblock.h, where 0 means "not set", and NBL_NO_WAIT a single try. */
inline std::int64_t timeout(const std::optional<std::chrono::milliseconds> &named)
{
    if (!named)
        return 0;
    if (named->count() < 0)
        throw error(errc::invalid_argument, "timeout must be 0 for a single try, longer, or nblock::forever (got " +
                                                std::to_string(named->count()) + " ms)");
    return *named == forever ? NBL_FOREVER : named->count() == 0 ? NBL_NO_WAIT : named->count();
}

inline std::int32_t on_or_off(const std::optional<bool> &named, std::int32_t otherwise)
{
    return named == true ? NBL_ON : named == false ? NBL_OFF : otherwise;
}

/** Any duration in whole milliseconds, rounded up; forever if it is too long for them. */
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

/** A handle of nblock.h that is freed when its owner is destroyed. */
template <class Handle, nbl_status_t (*Free)(Handle *)> struct freeing {
    void operator()(Handle *handle) const noexcept { Free(handle); }
};
template <class Handle, nbl_status_t (*Free)(Handle *)> using owned = std::unique_ptr<Handle, freeing<Handle, Free>>;

using op_handle = owned<nbl_op_t, nbl_op_free>;

/** The part of an operation that is the same for all result types. */
class operation_base {
  public:
    /** Returns a descriptor that becomes readable when the operation has ended, for poll, epoll or an event
     * loop; get() then does not wait. It belongs to the operation: do not read or close it. Throws error
     * (resources) if none can be made. Does not wait. */
    [[nodiscard]] int fd() const
    {
        const int descriptor = nbl_op_fd(op_.get());
        if (descriptor < 0)
            throw error(errc::resources, "the operation has no descriptor: it was moved from, or none could be made");
        return descriptor;
    }

    /** Returns whether the operation has ended. Does not wait, and does not take the result. */
    [[nodiscard]] bool ready() const { return wait_for(std::chrono::milliseconds::zero()); }

    /** Waits until the operation has ended, at most `length`. Returns whether it has ended. */
    template <class Rep, class Period>
    [[nodiscard]] bool wait_for(const std::chrono::duration<Rep, Period> &length) const
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

    /** Cancels the operation; get() then throws error (cancelled). An acquire is undone, even if it was
     * granted, unless get() has already returned the grant. An unlock or refresh continues anyway. Does
     * not wait. */
    void cancel() noexcept { nbl_op_cancel(op_.get()); }

    /** The handle for functions of nblock.h. It stays owned by this object: do not free it. */
    [[nodiscard]] nbl_op_t *c_handle() const noexcept { return op_.get(); }

  protected:
    explicit operation_base(nbl_op_t *op) noexcept : op_(op) {}

    op_handle op_;
};

} // namespace detail

/** An operation in progress, started by a _start function. Its destructor cancels it. */
template <class Result> class [[nodiscard]] operation : public detail::operation_base {
  public:
    /** Waits until the operation has ended, then returns or throws what the function without _start would
     * have. The exception: an acquire that was not granted in time returns false. Call it once only. */
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

/** Waits for the end of an operation without a result; throws if it failed. */
inline void end(nbl_op_t *op)
{
    call(nbl_op_wait, op, std::int64_t{NBL_FOREVER});
}

/** Starts an operation. */
template <class Function, class... Arguments> nbl_op_t *start(Function function, Arguments... arguments)
{
    nbl_op_t *op = nullptr;
    call(function, arguments..., &op);
    return op;
}

} // namespace detail

/** Options of a client. Options that are not set have the library's default. */
struct client_options {
    /** Length of a lease: 1 ms to 366 days. Default: 60 s. */
    std::optional<std::chrono::milliseconds> expire = std::nullopt;
    /** How long lock() waits; 0 for a single try, nblock::forever to wait forever. Default: 10 s. */
    std::optional<std::chrono::milliseconds> timeout = std::nullopt;
    /** Limit for one request to the store, at most one hour. Default: 5 s. */
    std::optional<std::chrono::milliseconds> op_timeout = std::nullopt;
    /** Limit for opening the store, at most one hour. Default: 5 s. */
    std::optional<std::chrono::milliseconds> connect_timeout = std::nullopt;
    /** The app name that is shown when locks are listed, at most 255 bytes. Default: the program's name. */
    std::string app = {};
};

/** Options of a lock, or of one call on it. Options that are not set are those of the lock, otherwise those of
 * its client. */
struct lock_options {
    /** Length of the lease: 1 ms to 366 days. Setting it turns renewal off, unless auto_refresh is set. */
    std::optional<std::chrono::milliseconds> expire = std::nullopt;
    /** How long lock() waits; 0 for a single try, nblock::forever to wait forever. */
    std::optional<std::chrono::milliseconds> timeout = std::nullopt;
    /** Whether the hold is renewed, each time after a third of its expire, until it is unlocked. Default: yes, unless
     * expire is set for the lock or the call. */
    std::optional<bool> auto_refresh = std::nullopt;
    /** Whether the grant comes with a fence. Every store except RethinkDB gives one in any case. */
    std::optional<bool> fence = std::nullopt;
};

/** The state of a lock object. */
enum class lock_state : nbl_lock_state_t {
    idle = NBL_STATE_IDLE,
    pending = NBL_STATE_PENDING, /**< an acquire or unlock is in progress */
    held = NBL_STATE_HELD,
    overdue = NBL_STATE_OVERDUE, /**< held, but past its deadline: another caller may take it over at any moment */
    lost = NBL_STATE_LOST,       /**< the next unlock() or refresh() will report it */
    forked = NBL_STATE_FORKED,   /**< held by the process that this one was forked from */
};

/** What client::ping found out about the store. */
struct ping {
    /** The name, version and address of the server that replied. */
    std::string server;
    /** Where the store is, as client::location. */
    std::string location;
    /** How long the reply took. */
    std::chrono::microseconds round_trip{};
    /** How far the server's clock is ahead of this machine's; not set if it is the same clock, or was not
     * measured. */
    std::optional<std::chrono::milliseconds> skew = std::nullopt;
    /** Warnings: what in the server's configuration endangers locks, and what to do about it. One on each
     * line; empty if there are none. */
    std::string caveats;

    /** From the struct of nblock.h. */
    explicit ping(const nbl_ping_t &facts)
        : server(facts.server), location(facts.location),
          round_trip(static_cast<std::chrono::microseconds::rep>(facts.round_trip_us)), caveats(facts.caveats)
    {
        if (facts.skew_measured != 0)
            skew = std::chrono::milliseconds(facts.skew_ms);
    }
};

/** One record of the store, as it was read. */
class record {
  public:
    /** The key. */
    std::string key;
    /** Base64 of the key's SHA-1, as NoBrainer stores it. */
    std::string key_hash;
    /** The holder's host name; empty if the record does not contain it. */
    std::string host;
    /** The boot id of the holder's machine; empty if the record does not contain it. */
    std::string boot_id;
    /** The holder's app name; empty if the record does not contain it. */
    std::string app;
    /** The holder's process id; 0 if the record does not contain it. */
    std::uint32_t pid = 0;
    /** Remaining time of the lease; if it has run out: minus the time since then. milliseconds::max() if the lease has
     * no end. */
    std::chrono::milliseconds remaining{};
    /** Whether the lease has run out. */
    bool expired = false;
    /** When the lease ends. time_point::max() if it has no end. */
    std::chrono::system_clock::time_point expires_at{};
    /** When the lock was granted; not set if the record does not contain it. */
    std::optional<std::chrono::system_clock::time_point> acquired_at = std::nullopt;
    /** The fence of the hold; not set if it has none. */
    std::optional<std::uint64_t> fence = std::nullopt;
    /** How many times a reentrant lock is locked; 0 for a plain one. */
    std::uint32_t lock_count = 0;
    /** Identifies exactly this state of the record: it changes with every renewal. Reveals no token. */
    std::string version;
    /** What is wrong with the record, if it is damaged; empty for a sound one. A damaged record is never granted: its
     * other fields may be empty, and key may be a placeholder. */
    std::string damaged;
    /** Whether nblock did not write the record: it is another library's lock or, in Redis, perhaps no lock at all, and
     * break_ does not delete it there. */
    bool foreign = false;

    /** Breaks the lock by force: deletes the record if it is still exactly as it was read, and returns
     * whether it did. The holder loses its hold, but may still be working. To break one particular hold,
     * compare fence, host and pid, or version first. Waits for the store's reply. Throws error. */
    [[nodiscard]] bool break_() const
    {
        return detail::call_or(NBL_NOT_FOUND, nbl_break, list_.get(), index_);
    }

    /** As break_, as an operation. */
    operation<bool> break_start() const
    {
        return {detail::start(nbl_break_start, list_.get(), index_), [](nbl_op_t *op) {
                    return detail::call_or(NBL_NOT_FOUND, nbl_op_wait, op, std::int64_t{NBL_FOREVER});
                }};
    }

  private:
    record(std::shared_ptr<nbl_list_t> list, std::size_t index) : list_(std::move(list)), index_(index)
    {
        nbl_record_t facts = NBL_RECORD_INIT;
        detail::call(nbl_list_record, list_.get(), index_, &facts);
        key.assign(facts.key, facts.key_len);
        key_hash = facts.key_hash;
        host = facts.host;
        boot_id = facts.boot_id;
        app = facts.app;
        version = facts.version;
        damaged = facts.damaged;
        foreign = facts.foreign != 0;
        pid = facts.pid;
        remaining = std::chrono::milliseconds(facts.remaining_ms);
        expired = facts.expired != 0;
        expires_at = facts.expires_at_ms == UINT64_MAX ? std::chrono::system_clock::time_point::max()
                                                       : detail::wall_time(facts.expires_at_ms);
        if (facts.acquired_at_ms != 0)
            acquired_at = detail::wall_time(facts.acquired_at_ms);
        if (facts.fence != 0)
            fence = facts.fence;
        lock_count = facts.lock_count;
    }

    std::shared_ptr<nbl_list_t> list_;
    std::size_t index_;

    friend class records;
};

/** Records as they were read from the store: a range of record objects, each made when it is accessed. */
class records {
  public:
    /** Goes through the records: an input iterator. */
    class iterator {
      public:
        /** @cond */
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
        /** @endcond */

      private:
        iterator(std::shared_ptr<nbl_list_t> list, std::size_t index) noexcept : list_(std::move(list)), index_(index)
        {
        }

        std::shared_ptr<nbl_list_t> list_;
        std::size_t index_;

        friend class records;
    };
    /** @cond */
    using const_iterator = iterator;
    using value_type = record;
    /** @endcond */

    /** Returns how many records there are. */
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    /** Returns whether there are none. */
    [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
    /** The first record. */
    [[nodiscard]] iterator begin() const noexcept { return {list_, 0}; }
    /** The end of the range. */
    [[nodiscard]] iterator end() const noexcept { return {list_, size_}; }
    /** Returns one record. Throws error (invalid_argument) if index is not less than size(). */
    [[nodiscard]] record operator[](std::size_t index) const { return record(list_, index); }

  private:
    explicit records(nbl_list_t *list) : list_(list, nbl_list_free) { detail::call(nbl_list_length, list, &size_); }

    std::shared_ptr<nbl_list_t> list_;
    std::size_t size_ = 0;

    friend class client;
};

/** An open store plus default options. */
class client {
  public:
    /** Opens a store: "embedded:", "embedded:/directory", "memory:", "memory:name", "redis://...",
     * "postgres://...", "rethinkdb://...".
     * Without a URL, or with NULL, the store is chosen as nbl_client_new in nblock.h says: NBLOCK_URL, then
     * NoBrainer's environment, then /etc/nblock.conf, then "embedded:". Waits for the store's reply, at most
     * client_options::connect_timeout. Throws error. */
    explicit client(const client_options &options = {}) : client(nullptr, options) {}
    /** Likewise, with a URL. */
    explicit client(const std::string &url, const client_options &options = {})
        : client(detail::up_to_nul(url, "url"), options)
    {
    }
    /** Likewise, with a URL, or NULL for none. */
    explicit client(const char *url, const client_options &options = {})
    {
        const nbl_client_options_t given = c_options(options);
        nbl_client_t *opened = nullptr;
        detail::call(nbl_client_new, url, &given, &opened);
        client_.reset(opened);
    }

    /** Starts opening the store that is chosen without a URL, as an operation whose get() returns the client. */
    static operation<client> open_start(const client_options &options = {}) { return opening(nullptr, options); }
    /** Likewise, with a URL. */
    static operation<client> open_start(const std::string &url, const client_options &options = {})
    {
        return opening(detail::up_to_nul(url, "url"), options);
    }

    /** Closes the client: waiting calls of its locks throw error (cancelled), holds that are renewed are
     * released, other holds run out with their leases. Closing again is not an error. Waits until the store
     * has accepted the releases, at most `timeout` (default: op_timeout). Throws error (indeterminate) if
     * that was too short: what could not be released runs out with its lease. */
    void close(std::optional<std::chrono::milliseconds> timeout = std::nullopt)
    {
        detail::call(nbl_client_close, client_.get(), detail::timeout(timeout));
    }

    /** Returns a description of where the store is, for people to read. It contains no password. Does not wait. */
    [[nodiscard]] std::string location() const { return detail::text(nbl_client_location, client_.get()); }

    /** Checks that the store replies, and returns what the reply says. Throws error if it does not reply. */
    nblock::ping ping() const
    {
        nbl_ping_t facts = NBL_PING_INIT;
        detail::call(nbl_client_ping, client_.get(), &facts);
        return nblock::ping(facts);
    }

    /** As ping, as an operation. */
    operation<nblock::ping> ping_start() const
    {
        return {detail::start(nbl_client_ping_start, client_.get()), [](nbl_op_t *op) {
                    detail::end(op);
                    nbl_ping_t facts = NBL_PING_INIT;
                    detail::call(nbl_op_take_ping, op, &facts);
                    return nblock::ping(facts);
                }};
    }

    /** Returns all records, in no particular order. Throws error. */
    [[nodiscard]] records list() const { return list(NBL_LIST_ALL); }
    /** As list, as an operation. */
    operation<records> list_start() const { return list_start(NBL_LIST_ALL); }

    /** Returns the records whose lease has run out. Throws error. */
    [[nodiscard]] records expired() const { return list(NBL_LIST_EXPIRED); }
    /** As expired, as an operation. */
    operation<records> expired_start() const { return list_start(NBL_LIST_EXPIRED); }

    /** Returns the record of a key; std::nullopt if there is none. A record whose lease has run out is found too.
     * Throws error. */
    [[nodiscard]] std::optional<record> find(std::string_view key) const
    {
        nbl_list_t *found = nullptr;
        if (!detail::call_or(NBL_NOT_FOUND, nbl_find, client_.get(), key.data(), key.size(), &found))
            return std::nullopt;
        return records(found)[0];
    }

    /** As find, as an operation. */
    operation<std::optional<record>> find_start(std::string_view key) const
    {
        return {detail::start(nbl_find_start, client_.get(), key.data(), key.size()),
                [](nbl_op_t *op) -> std::optional<record> {
                    if (!detail::call_or(NBL_NOT_FOUND, nbl_op_wait, op, std::int64_t{NBL_FOREVER}))
                        return std::nullopt;
                    return taken(op)[0];
                }};
    }

    /** The handle for functions of nblock.h. It stays owned by this object: do not free it. */
    [[nodiscard]] nbl_client_t *c_handle() const noexcept { return client_.get(); }

  private:
    /** Closes the client before freeing it: waits at most op_timeout. */
    struct closing {
        void operator()(nbl_client_t *client) const noexcept
        {
            nbl_client_close(client, 0, nullptr);
            nbl_client_free(client);
        }
    };

    explicit client(nbl_client_t *opened) noexcept : client_(opened) {}

    static operation<client> opening(const char *url, const client_options &options)
    {
        const nbl_client_options_t given = c_options(options);
        return {detail::start(nbl_client_new_start, url, &given), [](nbl_op_t *op) {
                    detail::end(op);
                    nbl_client_t *opened = nullptr;
                    detail::call(nbl_op_take_client, op, &opened);
                    return client(opened);
                }};
    }

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

/** The part that plain and reentrant locks have in common: TimedLockable, and the functions for leases. */
class basic_lock {
  public:
    basic_lock(const basic_lock &) = delete;
    basic_lock &operator=(const basic_lock &) = delete;

    /** Takes the lock, and waits for it, at most the timeout (default 10 s). Throws lock_unavailable if it was
     * not granted in time; error. */
    void lock()
    {
        detail::call(nbl_lock, lock_.get(), nullptr);
        last_unlock_ = NBL_OK;
    }
    /** Likewise, with options for this call. */
    void lock(const lock_options &options)
    {
        const nbl_lock_options_t given = c_options(options, 0);
        detail::call(nbl_lock, lock_.get(), &given);
        last_unlock_ = NBL_OK;
    }

    /** Tries once to take the lock. Returns whether it is held now. Throws error. */
    [[nodiscard]] bool try_lock() { return granted(nbl_try_lock, nullptr); }
    /** Likewise, with options for this call. */
    [[nodiscard]] bool try_lock(const lock_options &options)
    {
        const nbl_lock_options_t given = c_options(options, 0);
        return granted(nbl_try_lock, &given);
    }

    /** Takes the lock, and waits for it, at most `timeout`. Returns whether it is held now. Throws error. */
    template <class Rep, class Period>
    [[nodiscard]] bool try_lock_for(const std::chrono::duration<Rep, Period> &timeout)
    {
        lock_options options;
        options.timeout = detail::whole_milliseconds(timeout);
        const nbl_lock_options_t given = c_options(options, 0);
        return granted(nbl_lock, &given);
    }

    /** Takes the lock, and waits for it, at most until `limit`. Returns whether it is held now. Throws error. */
    template <class Clock, class Duration>
    [[nodiscard]] bool try_lock_until(const std::chrono::time_point<Clock, Duration> &limit)
    {
        /** The clock may be set while this waits. */
        while (!try_lock_for(limit - Clock::now()))
            if (Clock::now() >= limit)
                return false;
        return true;
    }

    /** As lock, as an operation, whose get() returns false if the lock was not granted in time. */
    operation<bool> lock_start(const lock_options &options = {})
    {
        const nbl_lock_options_t given = c_options(options, 0);
        nbl_op_t *op = detail::start(nbl_lock_start, lock_.get(), &given);
        last_unlock_ = NBL_OK;
        return {op, [](nbl_op_t *started) {
                    return detail::call_or(NBL_UNAVAILABLE, nbl_op_wait, started, std::int64_t{NBL_FOREVER});
                }};
    }

    /** Releases the hold, for guards, and keeps the result: see lost() and unlock_result(). Asks the store,
     * and waits for its reply, at most op_timeout. */
    void unlock() noexcept { unlocked(nbl_unlock(lock_.get(), nullptr)); }

    /** As unlock, but throws lost_lock if the hold was no longer ours, lock_invalid_op if there is no hold,
     * error (indeterminate) if no reply arrived: then the release continues in the background. */
    void release()
    {
        detail::answer answer;
        const nbl_status_t result = nbl_unlock(lock_.get(), answer.detail());
        unlocked(result);
        if (result != NBL_OK)
            answer.raise(result);
    }

    /** The form of release() that does not wait, as an operation. It does not change what lost() and
     * unlock_result() return. If it is cancelled or destroyed, the release continues. */
    operation<void> unlock_start() { return {detail::start(nbl_unlock_start, lock_.get()), detail::end}; }

    /** Returns whether the hold is lost or overdue, so that another holder may have the lock; if the lock is
     * idle, whether the last unlock or refresh() found the hold lost. An overdue hold may still be renewed or
     * unlocked: then this is false again, because nobody else had the lock. An operation reports a loss by its
     * get() alone. Does not ask the store. */
    [[nodiscard]] bool lost() const
    {
        const lock_state now = state();
        return now == lock_state::lost || now == lock_state::overdue || last_unlock_ == NBL_LOST;
    }

    /** Returns the result of the last unlock() or release(): no error, or one of errc. */
    [[nodiscard]] std::error_code unlock_result() const noexcept
    {
        const nbl_status_t last = last_unlock_;
        return last == NBL_OK ? std::error_code() : make_error_code(static_cast<errc>(last));
    }

    /** Locks, calls the body, unlocks, and returns what the body returned. Throws what lock() and release()
     * throw. If the body throws, the lock is unlocked as by unlock(), and the exception goes on to the caller.
     * The body may unlock the lock itself if no other thread uses the object. */
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

    /** Renews the hold: its lease ends `expire` from now; without `expire`, the length that was given last is
     * used again. Does not take the lock again if the hold is gone. Throws lost_lock, lock_invalid_op, error
     * (indeterminate: the hold continues; it ends as before, or earlier if the new lease is shorter). */
    void refresh(std::optional<std::chrono::milliseconds> expire = std::nullopt)
    {
        const nbl_lock_options_t given = refreshing(expire);
        detail::answer answer;
        const nbl_status_t result = nbl_refresh(lock_.get(), &given, answer.detail());
        if (result == NBL_LOST)
            last_unlock_ = NBL_LOST;
        if (result != NBL_OK)
            answer.raise(result);
    }

    /** As refresh, as an operation. If it is cancelled or destroyed, the renewal continues. */
    operation<void> refresh_start(std::optional<std::chrono::milliseconds> expire = std::nullopt)
    {
        const nbl_lock_options_t given = refreshing(expire);
        return {detail::start(nbl_refresh_start, lock_.get(), &given), detail::end};
    }

    /** Returns the state of this object. Does not ask the store. */
    [[nodiscard]] lock_state state() const
    {
        nbl_lock_state_t state = 0;
        detail::call(nbl_lock_state, lock_.get(), &state);
        return static_cast<lock_state>(state);
    }

    /** Returns whether the hold is certainly ours now. Does not ask the store. */
    [[nodiscard]] bool held() const { return state() == lock_state::held; }

    /** Returns for how long the hold is certainly ours; 0 if it is overdue. Throws lock_invalid_op if there is
     * no hold, lost_lock. Does not wait. */
    [[nodiscard]] std::chrono::milliseconds remaining() const
    {
        return std::chrono::milliseconds(static_cast<std::int64_t>(number(nbl_lock_remaining_ms)));
    }

    /** Returns when the lease ends, for people to read. Throws lock_invalid_op if there is no hold, lost_lock.
     * Does not wait. */
    [[nodiscard]] std::chrono::system_clock::time_point expires_at() const
    {
        return detail::wall_time(number(nbl_lock_expires_at_ms));
    }

    /** Returns the fence of the hold, a number that grows with every grant of this key, for a protected resource
     * that refuses a smaller one than the largest it has seen. If the grant brought none, the store is asked
     * now: waits at most 2 * op_timeout. Throws lock_invalid_op, lost_lock, error. */
    [[nodiscard]] std::uint64_t fence() const { return number(nbl_lock_fence); }

    /** As fence, as an operation. */
    operation<std::uint64_t> fence_start() const
    {
        return {detail::start(nbl_lock_fence_start, lock_.get()), [](nbl_op_t *op) {
                    detail::end(op);
                    std::uint64_t fence = 0;
                    detail::call(nbl_op_take_fence, op, &fence);
                    return fence;
                }};
    }

    /** Returns a descriptor that is readable while the hold is overdue or lost, for poll, epoll or an event loop.
     * It belongs to the lock: do not read or close it. Throws error (resources) if none can be made. Does not
     * wait. */
    [[nodiscard]] int lost_fd() const
    {
        const int descriptor = nbl_lock_lost_fd(lock_.get());
        if (descriptor < 0)
            throw error(errc::resources, "the lock has no descriptor: it was moved from, or none could be made");
        return descriptor;
    }

    /** The key. */
    [[nodiscard]] std::string key() const { return text(NBL_TEXT_KEY); }
    /** Base64 of the key's SHA-1, as NoBrainer stores it. */
    [[nodiscard]] std::string key_hash() const { return text(NBL_TEXT_KEY_HASH); }
    /** The text that proves the hold. Keep it secret: anybody who has it can end the hold. Throws lock_invalid_op
     * if there is no hold. */
    [[nodiscard]] std::string instance_token() const { return text(NBL_TEXT_INSTANCE_TOKEN); }

    /** The handle for functions of nblock.h. It stays owned by this object: do not free it. */
    [[nodiscard]] nbl_lock_t *c_handle() const noexcept { return lock_.get(); }

    /** @cond */
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

    /** The options for nblock.h; `renewal` is used if neither auto_refresh nor expire is set. */
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

    /** @endcond */
  private:
    /** Unlocks a held lock as many times as it was locked, then frees it: no hold leaks. */
    struct releasing {
        void operator()(nbl_lock_t *lock) const noexcept
        {
            const auto holds = [lock] {
                nbl_lock_state_t state = 0;
                return nbl_lock_state(lock, &state, nullptr) == NBL_OK &&
                       (state == NBL_STATE_HELD || state == NBL_STATE_OVERDUE);
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

    /** Keeps the result of an unlock. A loss that refresh() has reported is the result of the unlock after it. */
    void unlocked(nbl_status_t result) noexcept
    {
        if (result != NBL_ERR_INVALID_OP || last_unlock_ != NBL_LOST)
            last_unlock_ = result;
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

/** The lock on one key, for one holder: a TimedLockable, for std::lock_guard, std::unique_lock and
 * std::scoped_lock. Use it under the name nblock::lock.
 *
 * Threads that share one object take turns on it. A thread that already holds it must not lock it again: the
 * call would wait for that same thread until its timeout. The destructor releases the hold, and waits for the
 * store's reply. */
class plain_lock : public basic_lock {
  public:
    /** Makes a lock object for a key of 1 byte to 1 MiB of UTF-8. This does not take the lock, and does not
     * wait. Throws error (invalid_argument); lock_invalid_op if the client is closed. */
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

/** The name to use for plain_lock. (A class named lock could not have a member function lock.) */
using lock = plain_lock;

/** A lock that can be locked again while it is held, by every object with the same owner token: this one, another
 * one, or one in another process. The last unlock releases it. Everything else is as for lock. */
class reentrant_lock : public basic_lock {
  public:
    /** owner_token is 1 to 255 bytes of UTF-8; without it, a random one is made. Throws what the constructor of
     * lock throws. */
    reentrant_lock(const client &client, std::string_view key,
                   const std::optional<std::string> &owner_token = std::nullopt, const lock_options &defaults = {})
        : basic_lock(make(client, key, owner_token, defaults))
    {
    }
    /** Likewise, with a random owner token. */
    reentrant_lock(const client &client, std::string_view key, const lock_options &defaults)
        : basic_lock(make(client, key, std::nullopt, defaults))
    {
    }

    /** The owner token: every object that has it can lock again, and unlock. */
    [[nodiscard]] std::string owner_token() const { return text(NBL_TEXT_OWNER_TOKEN); }

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

/** How much is logged. */
enum class log_level : std::int32_t {
    error = NBL_LOG_ERROR,
    warn = NBL_LOG_WARN,
    info = NBL_LOG_INFO,
    debug = NBL_LOG_DEBUG,
    trace = NBL_LOG_TRACE,
};

/** Receives one line of the log. The line is valid during the call only. */
using log_function = std::function<void(log_level, std::string_view)>;

/** Sets the function that is called with every line that is logged, up to `level`; an empty function sets none.
 * It runs on a library thread, one line at a time. What it throws is ignored, and functions of nblock throw
 * lock_invalid_op inside it. Waits for a call of the old function that is running. Throws error. */
inline void set_log(log_function function, log_level level = log_level::info)
{
    static std::mutex setting;
    /** Not destroyed at exit: a line may still be in delivery then. */
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
    const nbl_status_t status = nbl_log_set(callback, next.get(), static_cast<std::int32_t>(level));
    if (status != NBL_OK)
        detail::answer().raise(status);
    delete std::exchange(current, next.release());
}

} // namespace nblock

#endif
