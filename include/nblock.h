/**
 * @file
 * nblock: distributed locks with leases, fencing and loss detection.
 *
 * Generated from the library's source: do not edit.
 *
 * ## Names
 *
 * Seven verbs are short: nbl_lock(), nbl_try_lock(), nbl_unlock(), nbl_refresh(), nbl_list(), nbl_find() and
 * nbl_break(). Other functions are `nbl_<noun>_<verb>`, such as nbl_client_close(), or `nbl_<noun>_<what it
 * returns>`, such as nbl_lock_state(). `X_start` starts X as an operation, and `nbl_op_take_<noun>` returns what
 * the operation got: a client or a list once, a fence or a ping any number of times.
 *
 * ## Status
 *
 * Unless their comment says otherwise, functions return an nbl_status_t: NBL_OK (0) on success, a positive
 * number for an expected outcome (NBL_UNAVAILABLE, NBL_LOST, ...), a negative number for a failure
 * (`NBL_ERR_...`). Three statuses are not repeated at every function: NBL_ERR_BAD_HANDLE,
 * NBL_ERR_INVALID_ARGUMENT and NBL_ERR_INTERNAL. At a `_start` function, NBL_ERR_RESOURCES is not repeated
 * either. The compiler warns of a call whose status is ignored, except of nbl_log_set(), nbl_op_cancel(),
 * nbl_client_close() and the `_free` functions.
 *
 * ## Error detail
 *
 * The last argument of most functions, err, points to an nbl_error_t, or is NULL. The caller allocates it and
 * sets struct_size; otherwise the call returns NBL_ERR_INVALID_ARGUMENT, and cannot say why. The call fills in
 * the status and a message for people, which names the key or the wrong value:
 *
 *     nbl_error_t err = NBL_ERROR_INIT;
 *
 * ## Handles
 *
 * Handles (`nbl_client_t *`, `nbl_lock_t *`, `nbl_op_t *`, `nbl_list_t *`) are checked ids, not addresses. A
 * call with a handle that is NULL, was freed, or is of another type returns NBL_ERR_BAD_HANDLE and does
 * nothing. The `_free` functions accept NULL, never wait, and may run on any thread.
 *
 * ## Out-parameters
 *
 * They come last before err, and are written on success only (but see `needed` of nbl_client_location()). One that
 * is NULL, or not aligned for its type, makes the call return NBL_ERR_INVALID_ARGUMENT before anything is done. A
 * handle that a function returns through its out-parameter belongs to the caller, who must pass it to the `_free`
 * function of its type.
 *
 * ## Options and other structs
 *
 * Structs begin with struct_size. Zero in any other field of options means the default, and so does a NULL
 * pointer instead of the struct:
 *
 *     nbl_lock_options_t options = NBL_LOCK_OPTIONS_INIT;
 *     options.expire_ms = 5000;
 *
 * In C, `{.struct_size = sizeof options, .expire_ms = 5000}` is the same.
 *
 * The same holds for parameters: 0 as timeout_ms or level means the default, and so does NULL as url,
 * owner_token or options. A time to wait is a positive number, NBL_NO_WAIT or NBL_FOREVER: unlike for poll, 0 is
 * not "do not wait". A switch is NBL_ON or NBL_OFF.
 *
 * A program built with an older header, whose structs are shorter, continues to work. The longer structs of a
 * newer header work too, as long as the fields that this library does not know are zero.
 *
 * ## Text
 *
 * Text is UTF-8. The library copies the text that it keeps. Text that it returns is copied into the caller's
 * buffer or struct; only the texts of an nbl_record_t are the library's, until nbl_list_free().
 *
 * ## Times
 *
 * Times are in milliseconds (`_ms`), one in microseconds (`_us`). A lease runs by the store's clock; the
 * library counts with CLOCK_BOOTTIME.
 *
 * ## Threads
 *
 * Every function may be called from any thread, and on one handle from many threads at once, also while another
 * thread frees that handle: a call that is already using it continues, unless the `_free` function says that it
 * is cancelled. No function may be called from a signal handler. The comment of each function says whether it
 * waits; `_start` functions never do. pthread_cancel takes effect when the call returns. A signal does not end a
 * wait: the call continues when the handler returns. For a wait that a signal can end, use nbl_lock_start(), and
 * wait for nbl_op_fd() together with a signalfd.
 *
 * The library starts threads of its own when it first needs them; they take no signals. It installs no signal
 * handlers and no exit handlers, and stays mapped after dlclose. The log callback is the only code of the program
 * that runs on one of the library's threads.
 *
 * ## Operations
 *
 * Every function that may wait on the store has a `_start` form that does not wait, except nbl_client_close() and
 * nbl_try_lock() (use nbl_lock_start() with NBL_NO_WAIT). It fails itself only for a bad handle, a bad argument or
 * NBL_ERR_RESOURCES. Otherwise it returns NBL_OK and an operation, which the caller must pass to nbl_op_free().
 * Every other outcome, such as "already locked", is the result of the operation: wait for its descriptor
 * (nbl_op_fd()) in any event loop, or call nbl_op_wait(). Then nbl_op_finish() returns what the form without
 * `_start` would have returned.
 *
 * ## Fork
 *
 * A client and its idle locks work in a forked child, which opens the store again when it first uses it. What the
 * parent holds stays with the parent: in the child, nbl_unlock() and nbl_refresh() return NBL_ERR_FORKED once, and
 * the lock is idle there afterwards. The parent is not affected. A `memory:` store is empty in a child.
 *
 * ## Holds
 *
 * A lock object holds the lock from a grant until it is unlocked or lost: that is a hold. The store keeps it as a
 * record, whose lease ends expire_ms after the grant or the last renewal. The library counts to a deadline that is a
 * little earlier; a hold past that is overdue: others may take it over. Breaking a lock (nbl_break()) deletes the
 * record by force.
 *
 * A hold is released only by nbl_unlock() and nbl_client_close(). With auto_refresh it is renewed until it is
 * unlocked or lost, its lock or client is freed, its client is closed, or the program ends. A hold that is neither
 * renewed nor released lasts until its lease runs out.
 *
 * What a lock cannot promise: a process or machine that is paused may continue after its lease has run out, and a
 * server whose clock steps moves the end of every lease. Only a fence that the protected resource checks closes
 * that gap: see nbl_lock_fence().
 */
#ifndef NBLOCK_H
#define NBLOCK_H

#include <stddef.h>
#include <stdint.h>

/** On functions whose result must not be ignored: the compiler warns. */
#if (defined(__cplusplus) && __cplusplus >= 201703L) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L)
#define NBL_MUST_USE [[nodiscard]]
#elif defined(__GNUC__)
#define NBL_MUST_USE __attribute__((warn_unused_result))
#else
#define NBL_MUST_USE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/**
 * @defgroup version Versions
 * Of the interface and of the library.
 * @{
 */

/**
 * The version of the interface that this header declares. It grows with every addition. A library
 * with the same soname and an equal or larger version has everything that is declared here.
 */
#define NBL_ABI_VERSION 1

/**
 * Returns the version of the interface that the library has.
 *
 * Does not wait.
 *
 * @return The NBL_ABI_VERSION that the library was built with.
 */
NBL_MUST_USE uint32_t nbl_abi_version(void);

/**
 * Returns the version of the library.
 *
 * Does not wait.
 *
 * @return The version, such as "0.1.0". The text is static: do not free it.
 */
NBL_MUST_USE const char *nbl_version(void);

/** @} */

/**
 * @defgroup handle Handles
 * What the functions work on.
 * @{
 */

/**
 * A client: an open store plus default options. Made by nbl_client_new, freed by nbl_client_free.
 */
typedef struct nbl_client_t nbl_client_t;

/**
 * Records as they were read. Made by nbl_list or nbl_find, freed by nbl_list_free.
 */
typedef struct nbl_list_t nbl_list_t;

/**
 * A lock object: one program's object for one key. Made by nbl_lock_new, freed by nbl_lock_free.
 */
typedef struct nbl_lock_t nbl_lock_t;

/**
 * An operation in progress. Made by a function whose name ends in _start, freed by nbl_op_free.
 */
typedef struct nbl_op_t nbl_op_t;

/** @} */

/**
 * @defgroup status Statuses
 * What a call returns.
 * @{
 */

/**
 * The result of a call: 0 on success, positive for an expected outcome, negative for a failure.
 * Numbers are never reused.
 */
typedef int32_t nbl_status_t;

/**
 * Success. From nbl_lock and nbl_try_lock: the lock is held.
 */
#define NBL_OK 0

/**
 * The lock was not granted: another holder had it for as long as the call waited.
 */
#define NBL_UNAVAILABLE 1

/**
 * The hold ended without our unlock: its lease ran out and another holder took it over, or it was
 * broken.
 */
#define NBL_LOST 2

/**
 * There is no such record, or it has changed since it was read.
 */
#define NBL_NOT_FOUND 3

/**
 * The operation is still in progress.
 */
#define NBL_PENDING 4

/**
 * The operation was cancelled, or its client was closed.
 */
#define NBL_CANCELLED 5

/**
 * The call does not fit the state: already locked, not locked, client closed.
 */
#define NBL_ERR_INVALID_OP (-1)

/**
 * An argument is wrong. Nothing was done.
 */
#define NBL_ERR_INVALID_ARGUMENT (-2)

/**
 * A handle is NULL, was freed, is of another type, or was not made by this library. Nothing was
 * done.
 */
#define NBL_ERR_BAD_HANDLE (-3)

/**
 * The store could not be reached, or was busy for too long. Nothing was applied.
 */
#define NBL_ERR_UNREACHABLE (-4)

/**
 * No reply arrived: the request may or may not have been applied.
 */
#define NBL_ERR_INDETERMINATE (-5)

/**
 * The store refused the credentials, or the account is not allowed to do this.
 */
#define NBL_ERR_DENIED (-6)

/**
 * The store refused the request, or a record in it is damaged.
 */
#define NBL_ERR_STORE (-7)

/**
 * The hold or the operation belongs to the process that this one was forked from.
 */
#define NBL_ERR_FORKED (-8)

/**
 * A defect of the library.
 */
#define NBL_ERR_INTERNAL (-9)

/**
 * The system has no more memory, threads, descriptors or disk space. Nothing was applied.
 */
#define NBL_ERR_RESOURCES (-10)

/**
 * The caller's buffer is too small for the text. Nothing was copied; the size that is needed was
 * reported.
 */
#define NBL_ERR_BUFFER_TOO_SMALL (-11)

/**
 * Returns the name of a status, such as "NBL_LOST".
 *
 * Does not wait.
 *
 * @param status A status.
 * @return The name, or "NBL_UNKNOWN" for a number that is not a status. The text is static: do not free
 * it.
 */
NBL_MUST_USE
const char *nbl_status_name(nbl_status_t status);

/** @} */

/**
 * @defgroup error Error detail
 * Why a call failed, in words.
 * @{
 */

/**
 * The size of a message in bytes, its NUL included.
 */
#define NBL_ERROR_MESSAGE_SIZE 1024

/**
 * What went wrong, with a message. The caller allocates it, sets struct_size, and passes it as the
 * last argument; NULL is allowed. Every call that takes one fills it in: after NBL_OK, with NBL_OK
 * and an empty message.
 */
typedef struct nbl_error_t {
  /**
   * sizeof(nbl_error_t).
   */
  uint32_t struct_size;
  /**
   * The status that the call returned.
   */
  nbl_status_t status;
  /**
   * NUL-terminated UTF-8. A message that is too long ends after the last character that fits.
   */
  char message[NBL_ERROR_MESSAGE_SIZE];
} nbl_error_t;

/** Initializes an nbl_error_t: struct_size is set, and everything else is zero. */
#define NBL_ERROR_INIT {sizeof(nbl_error_t), 0, {0}}

/** @} */

/**
 * @defgroup options Options
 * Of clients, of locks and of lists, and the values that they have in common.
 * @{
 */

/**
 * timeout_ms: try once, without waiting.
 */
#define NBL_NO_WAIT (-2)

/**
 * timeout_ms: wait forever. (-1, as for poll.)
 */
#define NBL_FOREVER (-1)

/**
 * auto_refresh, fence: yes.
 */
#define NBL_ON 1

/**
 * auto_refresh, fence: no.
 */
#define NBL_OFF (-1)

/**
 * if_held: if this lock object is already in use, return NBL_ERR_INVALID_OP. The default.
 */
#define NBL_IF_HELD_ERROR 1

/**
 * if_held: if this lock object is already in use, wait for its turn, first come, first served.
 * For lock objects that threads share. nbl_try_lock returns NBL_UNAVAILABLE at once.
 */
#define NBL_IF_HELD_WAIT 2

/**
 * filter of nbl_list(): all records. The default.
 */
#define NBL_LIST_ALL 1

/**
 * filter of nbl_list(): records whose lease has run out.
 */
#define NBL_LIST_EXPIRED 2

/**
 * Options of a client. NULL, or zero in a field, means the default.
 */
typedef struct nbl_client_options_t {
  /**
   * sizeof(nbl_client_options_t).
   */
  uint32_t struct_size;
  /**
   * Must be zero.
   */
  uint32_t reserved;
  /**
   * Length of a lease in milliseconds, for locks that set none: 1 to 31622400000 (366 days).
   * Default 60000.
   */
  int64_t expire_ms;
  /**
   * How long nbl_lock waits, in milliseconds, for locks that set none; or NBL_NO_WAIT, or
   * NBL_FOREVER. Default 10000.
   */
  int64_t timeout_ms;
  /**
   * Limit for one request to the store, in milliseconds: 1 to 3600000. Default 5000.
   */
  int64_t op_timeout_ms;
  /**
   * Limit for opening the store, in milliseconds: 1 to 3600000. Default 5000.
   */
  int64_t connect_timeout_ms;
  /**
   * The app name that is shown when locks are listed. NUL-terminated UTF-8, at most 255 bytes.
   * Default: the program's name.
   */
  const char *app;
} nbl_client_options_t;

/**
 * Options of a lock, or of one call on it. NULL, or zero in a field, means: as the lock was made
 * with, otherwise as its client was made with.
 */
typedef struct nbl_lock_options_t {
  /**
   * sizeof(nbl_lock_options_t).
   */
  uint32_t struct_size;
  /**
   * NBL_ON: renew the hold, each time after a third of its expire, until it is unlocked. Default
   * NBL_OFF.
   */
  int32_t auto_refresh;
  /**
   * Length of the lease in milliseconds: 1 to 31622400000 (366 days).
   */
  int64_t expire_ms;
  /**
   * How long to wait for a grant, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER.
   */
  int64_t timeout_ms;
  /**
   * What to do if this lock object is already in use: NBL_IF_HELD_ERROR or NBL_IF_HELD_WAIT.
   */
  int32_t if_held;
  /**
   * NBL_ON: the grant comes with a fence. Default NBL_OFF; every store except
   * RethinkDB gives one in any case.
   */
  int32_t fence;
} nbl_lock_options_t;

/**
 * Options of nbl_list. NULL, or zero in a field, means the default.
 */
typedef struct nbl_list_options_t {
  /**
   * sizeof(nbl_list_options_t).
   */
  uint32_t struct_size;
  /**
   * NBL_LIST_ALL or NBL_LIST_EXPIRED.
   */
  int32_t filter;
} nbl_list_options_t;

/** Initializes an nbl_client_options_t: struct_size is set, and everything else is zero, the default. */
#define NBL_CLIENT_OPTIONS_INIT {sizeof(nbl_client_options_t), 0, 0, 0, 0, 0, NULL}

/** Initializes an nbl_lock_options_t: struct_size is set, and everything else is zero, the default. */
#define NBL_LOCK_OPTIONS_INIT {sizeof(nbl_lock_options_t), 0, 0, 0, 0, 0}

/** Initializes an nbl_list_options_t: struct_size is set, and everything else is zero, the default. */
#define NBL_LIST_OPTIONS_INIT {sizeof(nbl_list_options_t), 0}

/** @} */

/**
 * @defgroup client Clients
 * A client is an open store plus default options.
 * @{
 */

/**
 * What nbl_client_ping found out about the store. The caller sets struct_size; the call fills in the
 * rest. A text that is too long ends after the last character that fits.
 */
typedef struct nbl_ping_t {
  /**
   * sizeof(nbl_ping_t).
   */
  uint32_t struct_size;
  /**
   * 1 if skew_ms was measured, otherwise 0: it is the same clock, or the server does not report its time.
   */
  uint32_t skew_measured;
  /**
   * How far the server's clock is ahead of this machine's, in milliseconds.
   */
  int64_t skew_ms;
  /**
   * How long the reply took, in microseconds.
   */
  uint64_t round_trip_us;
  /**
   * The name, version and address of the server that replied. NUL-terminated UTF-8.
   */
  char server[256];
  /**
   * Where the store is, as nbl_client_location. NUL-terminated UTF-8.
   */
  char location[512];
  /**
   * Warnings: what in the server's configuration endangers locks, and what to do about it. One on
   * each line; empty if there are none. NUL-terminated UTF-8.
   */
  char caveats[1024];
} nbl_ping_t;

/** Initializes an nbl_ping_t: struct_size is set, and everything else is zero. */
#define NBL_PING_INIT {sizeof(nbl_ping_t), 0, 0, 0, {0}, {0}, {0}}

/**
 * Opens a store.
 *
 * Waits for the store's reply, at most connect_timeout_ms.
 *
 * The choice of the store is made once, in this call: a forked child uses the same store, and if it may
 * not, its calls return NBL_ERR_DENIED. A program with more rights than its caller (set-user-id) ignores
 * the environment.
 *
 * @param url The store, NUL-terminated: `embedded:` or `embedded:/directory` (this machine, no server),
 * `memory:` or `memory:NAME` (this process, for tests), `redis://user:password@host:port/number?options`,
 * `postgres://user:password@host:port/database?options`, or
 * `rethinkdb://user:password@host:port,host:port/database?options`. NULL: in this order, the environment
 * variable NBLOCK_URL, NoBrainer's environment (RETHINKDB_URL and others), /etc/nblock.conf, `embedded:`.
 * @param options The options of the client, or NULL for the defaults.
 * @param out Receives the client. Free it with nbl_client_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The store is open.
 * @retval NBL_ERR_UNREACHABLE The store did not reply in time, or was busy for too long.
 * @retval NBL_ERR_DENIED The store refused the credentials, or the account is not allowed to use it.
 * @retval NBL_ERR_STORE The store refused the request, or is damaged.
 * @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
 */
NBL_MUST_USE
nbl_status_t nbl_client_new(const char *url,
                            const nbl_client_options_t *options,
                            nbl_client_t **out,
                            nbl_error_t *err);

/**
 * Starts nbl_client_new() as an operation; nbl_op_take_client() returns the client.
 *
 * Does not wait for the store, but opens the files of the embedded store on the calling thread.
 *
 * @param url As for nbl_client_new().
 * @param options As for nbl_client_new().
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_client_new_start(const char *url,
                                  const nbl_client_options_t *options,
                                  nbl_op_t **out,
                                  nbl_error_t *err);

/**
 * Closes a client.
 *
 * Waiting calls and operations on its locks end with NBL_CANCELLED. Holds with auto_refresh are released; other
 * holds run out with their leases. From then on, its locks return NBL_ERR_INVALID_OP. Closing again is not an error.
 * The handle stays valid until nbl_client_free(). In a forked child, this closes the child's client only.
 *
 * Waits until the store has accepted the releases, at most timeout_ms.
 *
 * @param client The client.
 * @param timeout_ms How long to wait, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER. 0 is the default:
 * the client's op_timeout_ms.
 * @param err The error detail, or NULL.
 * @retval NBL_OK Closed.
 * @retval NBL_ERR_INDETERMINATE Closed, but the time was too short for all releases. What could not be
 * released runs out with its lease.
 */
nbl_status_t nbl_client_close(nbl_client_t *client,
                              int64_t timeout_ms,
                              nbl_error_t *err);

/**
 * Frees a client.
 *
 * If nbl_client_close() was not called before, its holds are abandoned: they are no longer renewed, and run
 * out with their leases. Its locks remain valid handles that return NBL_ERR_INVALID_OP; they must still be
 * freed. Does not wait.
 *
 * @param client The client, or NULL.
 * @retval NBL_OK Freed, or NULL.
 */
nbl_status_t nbl_client_free(nbl_client_t *client);

/**
 * Copies a description of where the client's store is, for people to read. It contains no password.
 *
 * Does not wait.
 *
 * @param client The client.
 * @param buffer Receives the text, NUL-terminated. NULL, with 0 as buffer_size, to get only its size.
 * @param buffer_size The size of the buffer in bytes.
 * @param needed Receives the size of the text in bytes, its NUL included. NULL is allowed.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The text, or only its size, was written.
 * @retval NBL_ERR_BUFFER_TOO_SMALL buffer_size is too small. Nothing was copied, but needed was written.
 */
NBL_MUST_USE
nbl_status_t nbl_client_location(nbl_client_t *client,
                                 char *buffer,
                                 size_t buffer_size,
                                 size_t *needed,
                                 nbl_error_t *err);

/**
 * Checks that the store replies, and reports what the reply says.
 *
 * Waits at most op_timeout_ms.
 *
 * @param client The client.
 * @param out Receives the reply. The caller sets its struct_size; fields that the library does not know
 * are set to zero.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The store replied.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_client_ping(nbl_client_t *client,
                             nbl_ping_t *out,
                             nbl_error_t *err);

/**
 * Starts nbl_client_ping() as an operation; nbl_op_take_ping() returns the reply.
 *
 * Does not wait.
 *
 * @param client The client.
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_client_ping_start(nbl_client_t *client,
                                   nbl_op_t **out,
                                   nbl_error_t *err);

/** @} */

/**
 * @defgroup lock Locks
 * A lock object is one program's object for one key.
 * @{
 */

/** As key_len: the key is NUL-terminated. */
#define NBL_CSTR ((size_t)-1)

/**
 * field of nbl_lock_text(): the key.
 */
#define NBL_TEXT_KEY 1

/**
 * field of nbl_lock_text(): the hash of the key as NoBrainer stores it, base64 of SHA-1.
 */
#define NBL_TEXT_KEY_HASH 2

/**
 * field of nbl_lock_text(): the instance token of the hold. Keep it secret: anybody who has it can end the hold.
 */
#define NBL_TEXT_INSTANCE_TOKEN 3

/**
 * field of nbl_lock_text(), of a reentrant lock: its owner token.
 */
#define NBL_TEXT_OWNER_TOKEN 4

/**
 * The state of a lock object.
 */
typedef int32_t nbl_lock_state_t;

/**
 * Not locked by this object.
 */
#define NBL_STATE_IDLE 1

/**
 * An acquire or unlock is in progress.
 */
#define NBL_STATE_PENDING 2

/**
 * Held, and certainly ours at this moment.
 */
#define NBL_STATE_HELD 3

/**
 * Held, but past its deadline: another caller may take it over at any moment.
 */
#define NBL_STATE_OVERDUE 4

/**
 * Lost. The object cannot be locked again until nbl_unlock() or nbl_refresh() has reported it.
 */
#define NBL_STATE_LOST 5

/**
 * Held by the process that this one was forked from.
 */
#define NBL_STATE_FORKED 6

/**
 * Makes a lock object for a key. This does not take the lock.
 *
 * Does not wait.
 *
 * @param client The client.
 * @param key The key: 1 byte to 1 MiB of UTF-8.
 * @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
 * @param defaults The options of every call on this object, or NULL for those of the client.
 * @param out Receives the lock object. Free it with nbl_lock_free(), even if its client was freed before.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The lock object was made.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_lock_new(nbl_client_t *client,
                          const char *key,
                          size_t key_len,
                          const nbl_lock_options_t *defaults,
                          nbl_lock_t **out,
                          nbl_error_t *err);

/**
 * Makes a reentrant lock object for a key. This does not take the lock.
 *
 * Every lock object with the same owner token may lock the key again while it is held: this object,
 * another one, or one in another process. The record counts how many times it is locked, and the last
 * unlock deletes it. Any object with the token may unlock. Does not wait.
 *
 * @param client The client.
 * @param key The key: 1 byte to 1 MiB of UTF-8.
 * @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
 * @param owner_token The owner token: NUL-terminated, 1 to 255 bytes of UTF-8. NULL for a random one.
 * @param defaults The options of every call on this object, or NULL for those of the client.
 * @param out Receives the lock object. Free it with nbl_lock_free(), even if its client was freed before.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The lock object was made.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_reentrant_lock_new(nbl_client_t *client,
                                    const char *key,
                                    size_t key_len,
                                    const char *owner_token,
                                    const nbl_lock_options_t *defaults,
                                    nbl_lock_t **out,
                                    nbl_error_t *err);

/**
 * Frees a lock object.
 *
 * A hold is abandoned, not released: it is no longer renewed, its lease runs out, and a line is logged.
 *
 * A call that waits for its turn on this object (NBL_IF_HELD_WAIT) returns NBL_CANCELLED at once. A call that waits
 * for the lock is not woken: it returns NBL_UNAVAILABLE at its timeout, or NBL_CANCELLED when it would be granted, and
 * that grant is released. To end such a wait, use nbl_lock_start() and nbl_op_cancel(), or nbl_client_close().
 *
 * Does not wait, and may run in a finalizer, on any thread.
 *
 * @param lock The lock, or NULL.
 * @retval NBL_OK Freed, or NULL.
 */
nbl_status_t nbl_lock_free(nbl_lock_t *lock);

/**
 * Tries once to take the lock.
 *
 * After a failure, nothing remains in the store. The exception: if the network prevents the removal, a
 * record may remain for at most one lease.
 *
 * Waits for the store's reply, at most op_timeout_ms.
 *
 * @param lock The lock.
 * @param options The differences for this call, or NULL. timeout_ms in them is ignored.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The lock is held.
 * @retval NBL_UNAVAILABLE Another holder has it.
 * @retval NBL_CANCELLED The client was closed, or the lock was freed, during the call.
 * @retval NBL_ERR_INVALID_OP This object already holds it (but see NBL_IF_HELD_WAIT), also if the hold is overdue,
 * or lost and not reported yet: call nbl_unlock() first. Or its client is closed.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request, or the record of the key is damaged.
 * @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
 */
NBL_MUST_USE
nbl_status_t nbl_try_lock(nbl_lock_t *lock,
                          const nbl_lock_options_t *options,
                          nbl_error_t *err);

/**
 * Takes the lock, and waits for it.
 *
 * Waits at most timeout_ms (see nbl_lock_options_t). The threads of this process that wait for a plain lock are
 * served in the order of their calls. The call keeps waiting during an outage of the store.
 *
 * @param lock The lock.
 * @param options The differences for this call, or NULL.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The lock is held.
 * @retval NBL_UNAVAILABLE It was not granted in time.
 * @retval NBL_CANCELLED The client was closed, or the lock was freed, during the call.
 * @retval NBL_ERR_INVALID_OP This object already holds it (but see NBL_IF_HELD_WAIT), also if the hold is overdue,
 * or lost and not reported yet: call nbl_unlock() first. Or its client is closed.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached when the timeout ended.
 * @retval NBL_ERR_INDETERMINATE As NBL_ERR_UNREACHABLE: no reply arrived.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request, or the record of the key is damaged.
 * @retval NBL_ERR_RESOURCES There is no more memory, threads, descriptors or disk space.
 */
NBL_MUST_USE
nbl_status_t nbl_lock(nbl_lock_t *lock,
                      const nbl_lock_options_t *options,
                      nbl_error_t *err);

/**
 * Starts nbl_lock() as an operation; with NBL_NO_WAIT as timeout_ms, nbl_try_lock().
 *
 * If the operation is cancelled or freed before nbl_op_finish() or nbl_op_wait() has reported its grant, the grant
 * is released. Does not wait.
 *
 * @param lock The lock.
 * @param options The differences for this call, or NULL.
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_lock_start(nbl_lock_t *lock,
                            const nbl_lock_options_t *options,
                            nbl_op_t **out,
                            nbl_error_t *err);

/**
 * Releases the hold. For a reentrant lock: releases the innermost step, that is, what was locked last.
 *
 * Waits at most op_timeout_ms.
 *
 * @param lock The lock.
 * @param err The error detail, or NULL.
 * @retval NBL_OK Released, and nobody else had the lock meanwhile, even if the lease had run out. The lock is idle.
 * @retval NBL_LOST The hold was no longer ours. This is reported once; the lock is idle. For a reentrant
 * lock, a loss ends everything that this object has locked, and the nbl_unlock() of each of these steps
 * returns NBL_LOST.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms. The lock is idle, and the release
 * continues in the background.
 * @retval NBL_ERR_DENIED The account is not allowed to do this. The lock is idle; its lease runs out.
 * @retval NBL_ERR_STORE The store refused the request. The lock is idle; its lease runs out.
 * @retval NBL_ERR_FORKED The hold belongs to the parent process. This is reported once.
 * @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_unlock(nbl_lock_t *lock,
                        nbl_error_t *err);

/**
 * Starts nbl_unlock() as an operation.
 *
 * Even if the operation is cancelled or freed, the release continues. Does not wait.
 *
 * @param lock The lock.
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE nbl_status_t nbl_unlock_start(nbl_lock_t *lock, nbl_op_t **out, nbl_error_t *err);

/**
 * Renews the hold: its lease ends expire_ms from now.
 *
 * Does not take the lock again if the hold is gone. Waits at most op_timeout_ms.
 *
 * @param lock The lock.
 * @param options Only expire_ms in them is used. If they set none, or are NULL, the length that was given
 * last is used again.
 * @param err The error detail, or NULL.
 * @retval NBL_OK Renewed; also if the lease had run out and nobody else had the lock meanwhile.
 * @retval NBL_LOST The hold is no longer ours. This is reported once; the lock is idle.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms. The hold continues; it ends as
 * before, or earlier if the new lease is shorter.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long. The hold continues as before.
 * @retval NBL_ERR_DENIED The account is not allowed to do this. The hold continues as before.
 * @retval NBL_ERR_STORE The store refused the request. The hold continues as before.
 * @retval NBL_ERR_FORKED The hold belongs to the parent process. This is reported once.
 * @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_refresh(nbl_lock_t *lock,
                         const nbl_lock_options_t *options,
                         nbl_error_t *err);

/**
 * Starts nbl_refresh() as an operation.
 *
 * Even if the operation is cancelled or freed, the renewal continues. Does not wait.
 *
 * @param lock The lock.
 * @param options As for nbl_refresh().
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_refresh_start(nbl_lock_t *lock,
                               const nbl_lock_options_t *options,
                               nbl_op_t **out,
                               nbl_error_t *err);

/**
 * Reports the state of the lock object.
 *
 * Does not ask the store, and does not wait.
 *
 * @param lock The lock.
 * @param out Receives the state, NBL_STATE_IDLE to NBL_STATE_FORKED.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 */
NBL_MUST_USE nbl_status_t nbl_lock_state(nbl_lock_t *lock, nbl_lock_state_t *out, nbl_error_t *err);

/**
 * Reports for how long the hold is certainly ours.
 *
 * This is counted from before the last request was sent, minus a margin, so it is never longer than the
 * store's own lease. Does not wait.
 *
 * @param lock The lock.
 * @param out Receives the time in milliseconds; 0 if the hold is overdue.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_ERR_INVALID_OP The lock is not held.
 * @retval NBL_LOST The hold was lost. Later calls return it again.
 * @retval NBL_ERR_FORKED The hold belongs to the parent process. Later calls return it again.
 */
NBL_MUST_USE
nbl_status_t nbl_lock_remaining_ms(nbl_lock_t *lock,
                                   uint64_t *out,
                                   nbl_error_t *err);

/**
 * Reports when the lease of the hold ends, for people to read.
 *
 * Does not wait.
 *
 * @param lock The lock.
 * @param out Receives the wall-clock time, in milliseconds since 1970.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_ERR_INVALID_OP The lock is not held.
 * @retval NBL_LOST The hold was lost. Later calls return it again.
 * @retval NBL_ERR_FORKED The hold belongs to the parent process. Later calls return it again.
 */
NBL_MUST_USE nbl_status_t nbl_lock_expires_at_ms(nbl_lock_t *lock, uint64_t *out, nbl_error_t *err);

/**
 * Reports the fence of the hold: a number below 2^53 that grows with every grant of this key.
 *
 * The protected resource must refuse a request whose fence is smaller than the largest it has seen.
 *
 * Unlike nbl_lock_state(), this may ask the store: if the grant brought no fence, the store is asked for one now, and
 * the hold is proven before the fence is returned: this waits at most 2 * op_timeout_ms. Otherwise it does not wait.
 *
 * @param lock The lock.
 * @param out Receives the fence.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_LOST The hold is no longer ours.
 * @retval NBL_ERR_INVALID_OP The lock is not held, or its client is closed.
 * @retval NBL_ERR_FORKED The hold belongs to the parent process.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived. The hold continues.
 * @retval NBL_ERR_DENIED The account is not allowed to do this. The hold continues.
 * @retval NBL_ERR_STORE The store refused the request. The hold continues.
 */
NBL_MUST_USE
nbl_status_t nbl_lock_fence(nbl_lock_t *lock,
                            uint64_t *out,
                            nbl_error_t *err);

/**
 * Starts nbl_lock_fence() as an operation; nbl_op_take_fence() returns the number.
 *
 * Does not wait.
 *
 * @param lock The lock.
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE nbl_status_t nbl_lock_fence_start(nbl_lock_t *lock, nbl_op_t **out, nbl_error_t *err);

/**
 * Returns a descriptor that is readable while the hold is overdue or lost, for poll, epoll or an event loop.
 *
 * The descriptor is made at the first call, level-triggered and close-on-exec. It may be asked for before the lock
 * is taken, and serves every later hold of this object: it stops being readable when a renewal succeeds, or when the
 * loss was reported. It belongs to the library, and stays open until the lock is freed: do not read or close it, and
 * remove it from what you poll before nbl_lock_free(). A forked child must call this again for a descriptor of its
 * own. Does not wait.
 *
 * @param lock The lock.
 * @return The descriptor; -1 if there is none, because the handle is wrong or none could be made.
 */
NBL_MUST_USE
int32_t nbl_lock_lost_fd(nbl_lock_t *lock);

/**
 * Copies a text of the lock.
 *
 * Does not wait.
 *
 * @param lock The lock.
 * @param field NBL_TEXT_KEY, NBL_TEXT_KEY_HASH, NBL_TEXT_INSTANCE_TOKEN or NBL_TEXT_OWNER_TOKEN. A key may
 * contain NUL bytes: needed says how long it is.
 * @param buffer Receives the text, NUL-terminated. NULL, with 0 as buffer_size, to get only its size.
 * @param buffer_size The size of the buffer in bytes.
 * @param needed Receives the size of the text in bytes, its NUL included. NULL is allowed.
 * @param err The error detail, or NULL.
 * @retval NBL_OK The text, or only its size, was written.
 * @retval NBL_ERR_BUFFER_TOO_SMALL buffer_size is too small. Nothing was copied, but needed was written.
 * @retval NBL_ERR_INVALID_OP For NBL_TEXT_INSTANCE_TOKEN: the lock is not held.
 * @retval NBL_LOST For NBL_TEXT_INSTANCE_TOKEN: the hold was lost.
 * @retval NBL_ERR_FORKED For NBL_TEXT_INSTANCE_TOKEN: the hold belongs to the parent process.
 */
NBL_MUST_USE
nbl_status_t nbl_lock_text(nbl_lock_t *lock,
                           int32_t field,
                           char *buffer,
                           size_t buffer_size,
                           size_t *needed,
                           nbl_error_t *err);

/** @} */

/**
 * @defgroup op Operations
 * What a `_start` function starts, for event loops.
 * @{
 */

/**
 * Returns a descriptor that becomes readable when the operation has ended, for poll, epoll or an event loop.
 *
 * The descriptor is made at the first call, level-triggered and close-on-exec. It belongs to the library,
 * and stays open until the operation is freed: do not read or close it. Does not wait.
 *
 * @param op The operation.
 * @return The descriptor; -1 if there is none, because the handle is wrong, the operation belongs to the
 * parent process, or none could be made.
 */
NBL_MUST_USE
int32_t nbl_op_fd(nbl_op_t *op);

/**
 * Waits until the operation has ended, and reports its result, as nbl_op_finish() does.
 *
 * Any number of threads may wait. If the operation is cancelled or freed, they stop waiting. Waits at most
 * timeout_ms.
 *
 * @param op The operation.
 * @param timeout_ms How long to wait, in milliseconds; or NBL_NO_WAIT, or NBL_FOREVER. 0 is the default:
 * NBL_FOREVER. To ask without waiting, call nbl_op_finish().
 * @param err The error detail, or NULL.
 * @return What nbl_op_finish() returns: NBL_PENDING if the operation has not ended.
 */
NBL_MUST_USE
nbl_status_t nbl_op_wait(nbl_op_t *op,
                         int64_t timeout_ms,
                         nbl_error_t *err);

/**
 * Reports the result of the operation. May be called again.
 *
 * After the first NBL_OK for nbl_lock_start(), the caller has the hold and must unlock it. Does not wait.
 *
 * @param op The operation.
 * @param err The error detail, or NULL.
 * @retval NBL_PENDING The operation is still in progress.
 * @retval NBL_CANCELLED It was cancelled.
 * @retval NBL_ERR_FORKED It belongs to the parent process.
 * @return Otherwise, what the function without _start would have returned.
 */
NBL_MUST_USE
nbl_status_t nbl_op_finish(nbl_op_t *op,
                           nbl_error_t *err);

/**
 * Cancels the operation.
 *
 * An nbl_lock_start() is given up, and nothing of it remains in the store; if it was granted but neither
 * nbl_op_finish() nor nbl_op_wait() has reported that yet, the grant is released. An unlock, a refresh or a break
 * continues anyway. A ping, a list, a find or a fence is given up. A client or a list that was not taken is freed.
 * If the operation has ended and its result was reported, nothing changes. Does not wait.
 *
 * @param op The operation.
 * @retval NBL_OK Done.
 * @retval NBL_ERR_FORKED The operation belongs to the parent process, and continues there.
 */
nbl_status_t nbl_op_cancel(nbl_op_t *op);

/**
 * Frees the operation.
 *
 * If it is in progress, or its result was not reported yet, it is cancelled first (nbl_op_cancel()). Does
 * not wait. Remove its descriptor from what you poll before.
 *
 * @param op The operation, or NULL.
 * @retval NBL_OK Freed, or NULL.
 */
nbl_status_t nbl_op_free(nbl_op_t *op);

/**
 * Returns the client that nbl_client_new_start() opened, after the operation has ended with NBL_OK.
 *
 * It can be taken once. Does not wait.
 *
 * @param op The operation.
 * @param out Receives the client. Free it with nbl_client_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_PENDING The operation is still in progress.
 * @retval NBL_ERR_INVALID_OP The client was already taken, or the operation was started by another function.
 * @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
 */
NBL_MUST_USE
nbl_status_t nbl_op_take_client(nbl_op_t *op,
                                nbl_client_t **out,
                                nbl_error_t *err);

/**
 * Returns the records that nbl_list_start() or nbl_find_start() found, after the operation has ended with
 * NBL_OK.
 *
 * They can be taken once. Does not wait.
 *
 * @param op The operation.
 * @param out Receives the list. Free it with nbl_list_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_PENDING The operation is still in progress.
 * @retval NBL_ERR_INVALID_OP The list was already taken, or the operation was started by another function.
 * @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
 */
NBL_MUST_USE
nbl_status_t nbl_op_take_list(nbl_op_t *op,
                              nbl_list_t **out,
                              nbl_error_t *err);

/**
 * Returns the fence that nbl_lock_fence_start() got, after the operation has ended with NBL_OK.
 *
 * May be called again. Does not wait.
 *
 * @param op The operation.
 * @param out Receives the fence.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_PENDING The operation is still in progress.
 * @retval NBL_ERR_INVALID_OP The operation was started by another function.
 * @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
 */
NBL_MUST_USE
nbl_status_t nbl_op_take_fence(nbl_op_t *op,
                               uint64_t *out,
                               nbl_error_t *err);

/**
 * Returns the reply that nbl_client_ping_start() got, after the operation has ended with NBL_OK.
 *
 * May be called again. Does not wait.
 *
 * @param op The operation.
 * @param out Receives the reply. The caller sets its struct_size; fields that the library does not know
 * are set to zero.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_PENDING The operation is still in progress.
 * @retval NBL_ERR_INVALID_OP The operation was started by another function.
 * @return Otherwise, what nbl_op_finish() returns: the operation failed, or belongs to the parent process.
 */
NBL_MUST_USE
nbl_status_t nbl_op_take_ping(nbl_op_t *op,
                              nbl_ping_t *out,
                              nbl_error_t *err);

/** @} */

/**
 * @defgroup list Records
 * Looking at the records of a store, and breaking locks.
 * @{
 */

/**
 * One record. The caller sets struct_size; nbl_list_record fills in the rest.
 *
 * The texts belong to the list, are NUL-terminated and never NULL, and stay valid until nbl_list_free.
 */
typedef struct nbl_record_t {
  /**
   * sizeof(nbl_record_t).
   */
  uint32_t struct_size;
  /**
   * The holder's process id; 0 if the record does not contain it.
   */
  uint32_t pid;
  /**
   * Remaining time of the lease by the store's clock, in milliseconds. If the lease has run out:
   * minus the milliseconds since then, at most -1. INT64_MAX if the lease has no end.
   */
  int64_t remaining_ms;
  /**
   * Wall-clock time at which the lease ends, in milliseconds since 1970. UINT64_MAX if the lease has
   * no end.
   */
  uint64_t expires_at_ms;
  /**
   * Wall-clock time of the grant, in milliseconds since 1970; 0 if the record does not contain
   * it.
   */
  uint64_t acquired_at_ms;
  /**
   * The fence of the hold; 0 if it has none.
   */
  uint64_t fence;
  /**
   * How many times a reentrant lock is locked; 0 for a plain lock.
   */
  uint32_t lock_count;
  /**
   * 1 if the lease has run out, otherwise 0.
   */
  uint32_t expired;
  /**
   * The key. It may contain NUL bytes: key_len says how long it is.
   */
  const char *key;
  /**
   * The length of the key in bytes.
   */
  size_t key_len;
  /**
   * The hash of the key as NoBrainer stores it, base64 of SHA-1.
   */
  const char *key_hash;
  /**
   * The holder's host name; empty if the record does not contain it.
   */
  const char *host;
  /**
   * The boot id of the holder's machine; empty if the record does not contain it.
   */
  const char *boot_id;
  /**
   * The holder's app name; empty if the record does not contain it.
   */
  const char *app;
  /**
   * The version of the record, 16 characters that identify exactly this state of it. It changes
   * with every renewal, and reveals no token.
   */
  const char *version;
  /**
   * What is wrong with a damaged record; empty if the record is intact. Only the embedded store lists
   * damaged records. Of these fields, key_hash is then valid, and key if key_hash is its hash. The key
   * stays locked until the record is broken (nbl_break).
   */
  const char *damaged;
  /**
   * 1 if nblock did not write the record: it is another library's lock or, in Redis, perhaps no lock
   * at all, and nbl_break does not delete it there. Otherwise 0.
   */
  uint32_t foreign;
  /**
   * Always zero.
   */
  uint32_t reserved;
} nbl_record_t;

/**
 * Lists records: all, or those whose lease has run out.
 *
 * Waits at most op_timeout_ms for each part of the list.
 *
 * @param client The client.
 * @param options Which records to list, or NULL for all.
 * @param out Receives the list, which may be empty, in no particular order. Free it with nbl_list_free(),
 * even if its client was freed before.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_list(nbl_client_t *client,
                      const nbl_list_options_t *options,
                      nbl_list_t **out,
                      nbl_error_t *err);

/**
 * Starts nbl_list() as an operation; nbl_op_take_list() returns the list.
 *
 * Does not wait.
 *
 * @param client The client.
 * @param options As for nbl_list().
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_list_start(nbl_client_t *client,
                            const nbl_list_options_t *options,
                            nbl_op_t **out,
                            nbl_error_t *err);

/**
 * Finds the record of a key.
 *
 * Waits at most op_timeout_ms.
 *
 * @param client The client.
 * @param key The key: 1 byte to 1 MiB of UTF-8.
 * @param key_len The length of the key in bytes, or NBL_CSTR if it is NUL-terminated.
 * @param out Receives a list with one record. Free it with nbl_list_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_NOT_FOUND There is no record; the key was never locked, or was unlocked.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_find(nbl_client_t *client,
                      const char *key,
                      size_t key_len,
                      nbl_list_t **out,
                      nbl_error_t *err);

/**
 * Starts nbl_find() as an operation; nbl_op_take_list() returns the list with one record.
 *
 * Does not wait.
 *
 * @param client The client.
 * @param key As for nbl_find().
 * @param key_len As for nbl_find().
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_find_start(nbl_client_t *client,
                            const char *key,
                            size_t key_len,
                            nbl_op_t **out,
                            nbl_error_t *err);

/**
 * Reports how many records the list has.
 *
 * Does not wait.
 *
 * @param list The list.
 * @param out Receives the number.
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 */
NBL_MUST_USE nbl_status_t nbl_list_length(nbl_list_t *list, size_t *out, nbl_error_t *err);

/**
 * Returns one record of the list.
 *
 * Does not wait.
 *
 * @param list The list.
 * @param index Which record, counted from 0.
 * @param out Receives the record. The caller sets its struct_size; fields that the library does not know
 * are set to zero. Its texts are valid until nbl_list_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK out was written.
 * @retval NBL_ERR_INVALID_ARGUMENT There is no such index, or struct_size is impossible.
 */
NBL_MUST_USE
nbl_status_t nbl_list_record(nbl_list_t *list,
                             size_t index,
                             nbl_record_t *out,
                             nbl_error_t *err);

/**
 * Frees a list, and the texts of its records.
 *
 * Does not wait.
 *
 * @param list The list, or NULL.
 * @retval NBL_OK Freed, or NULL.
 */
nbl_status_t nbl_list_free(nbl_list_t *list);

/**
 * Breaks a lock by force: deletes a record if it is still exactly as it was read.
 *
 * The holder, if there is one, loses its hold, but may still be working. To break one particular hold, find
 * the record, compare its fence, its holder or its version with what was read before, and break it through
 * that list. Waits at most op_timeout_ms.
 *
 * @param list The list.
 * @param index Which record, counted from 0.
 * @param err The error detail, or NULL.
 * @retval NBL_OK Deleted.
 * @retval NBL_NOT_FOUND The record has changed, as it does with every renewal, or is gone; or it is in Redis
 * and nblock did not write it: it may be another program's data. Nothing was deleted.
 * @retval NBL_ERR_UNREACHABLE The store could not be reached, or was busy for too long.
 * @retval NBL_ERR_INDETERMINATE No reply arrived within op_timeout_ms.
 * @retval NBL_ERR_DENIED The account is not allowed to do this.
 * @retval NBL_ERR_STORE The store refused the request.
 * @retval NBL_ERR_INVALID_OP The client is closed.
 */
NBL_MUST_USE
nbl_status_t nbl_break(nbl_list_t *list,
                       size_t index,
                       nbl_error_t *err);

/**
 * Starts nbl_break() as an operation.
 *
 * Does not wait.
 *
 * @param list The list.
 * @param index As for nbl_break().
 * @param out Receives the operation. Free it with nbl_op_free().
 * @param err The error detail, or NULL.
 * @retval NBL_OK The operation was started.
 */
NBL_MUST_USE
nbl_status_t nbl_break_start(nbl_list_t *list,
                             size_t index,
                             nbl_op_t **out,
                             nbl_error_t *err);

/** Initializes an nbl_record_t: struct_size is set, and everything else is zero. */
#define NBL_RECORD_INIT {sizeof(nbl_record_t), 0, 0, 0, 0, 0, 0, 0, NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0}

/** @} */

/**
 * @defgroup log Log
 * The lines that the library logs.
 * @{
 */

/**
 * level of nbl_log_set(): errors only.
 */
#define NBL_LOG_ERROR 1

/**
 * level of nbl_log_set(): what needs attention, such as a lost hold.
 */
#define NBL_LOG_WARN 2

/**
 * level of nbl_log_set(): useful information, such as which store is used and why. The default.
 */
#define NBL_LOG_INFO 3

/**
 * level of nbl_log_set(): what helps to find the cause of a problem.
 */
#define NBL_LOG_DEBUG 4

/**
 * level of nbl_log_set(): everything.
 */
#define NBL_LOG_TRACE 5

/**
 * Receives one line of the log.
 *
 * level is the line's level (NBL_LOG_...). line is NUL-terminated UTF-8 without a line end, and
 * valid during the call only. user is the pointer that was passed to nbl_log_set.
 *
 * Called on a library thread that does nothing else, one line at a time. Inside it, nbl_*
 * functions return NBL_ERR_INVALID_OP.
 */
typedef void (*nbl_log_fn)(int32_t level, const char *line, void *user);

/**
 * Sets the function that receives the lines of the log. It replaces the one that was set before.
 *
 * Waits for a call of the old function that is running; the old user pointer is not used after that.
 *
 * Without a function, lines go to standard error if the environment variable NBLOCK_LOG names a level
 * (error, warn, info, debug, trace). Lines that arrive faster than the function takes them are dropped, so
 * that logging never waits.
 *
 * @param callback The function, which is called with every line up to the level; or NULL for none.
 * @param user A pointer that the function gets with every line. May be NULL.
 * @param level NBL_LOG_ERROR to NBL_LOG_TRACE; 0 is the default, NBL_LOG_INFO. Ignored if callback is NULL.
 * @retval NBL_OK Set.
 * @retval NBL_ERR_INVALID_ARGUMENT There is no such level.
 * @retval NBL_ERR_INVALID_OP Called from inside the callback.
 * @retval NBL_ERR_RESOURCES The thread that calls the function could not be started.
 */
nbl_status_t nbl_log_set(nbl_log_fn callback,
                         void *user,
                         int32_t level);

/** @} */

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* NBLOCK_H */
