/*
 * nblock: distributed locks with leases, fencing and loss detection.
 *
 * Generated from the library's source: do not edit.
 *
 * Conventions
 *
 * Status. Calls answer an nbl_status_t: NBL_OK (0), a positive number for an expected outcome
 * (NBL_UNAVAILABLE, NBL_LOST, ...), a negative one for a failure (NBL_ERR_...).
 *
 * Detail. The last argument of most calls is an nbl_error_t *, which may be NULL. The caller
 * allocates it and sets struct_size; the call fills in its status and a message that names the
 * value and says what to do:
 *
 *     nbl_error_t err = {.struct_size = sizeof err};
 *
 * Handles (nbl_client_t *, nbl_lock_t *, nbl_op_t *, nbl_list_t *) are checked ids, not addresses.
 * One that is NULL, was freed, or is of another kind answers NBL_ERR_BAD_HANDLE and does no harm.
 * What a function gives through its out-parameter is the caller's, to be given to the _free function
 * of its type, which takes NULL, never waits, and may run on any thread. Out-parameters are written
 * on success only, and come last before err; one that is NULL, or not aligned for its type, answers
 * NBL_ERR_INVALID_ARGUMENT, and nothing is done.
 *
 * Options structs begin with struct_size, and zero means "the default" in every field:
 *
 *     nbl_lock_options_t options = {.struct_size = sizeof options, .expire_ms = 5000};
 *
 * A pointer to one may be NULL. A program built with an older header, whose structs are shorter, goes
 * on working; a newer one's longer structs work as long as it leaves unknown fields zero.
 *
 * Text is UTF-8. The library copies what it keeps, and copies into the caller's buffers.
 *
 * Times are milliseconds. A lease runs by the store's clock; the library counts with CLOCK_BOOTTIME.
 *
 * Threads. Every function may be called from every thread, on one handle from many at once, also
 * while another one frees it: calls that are using it then go on. None may be called from a signal
 * handler. Calls that may wait say so; the others return at once. A thread that is cancelled
 * (pthread_cancel) is so after its call, and not in it. The library has threads of its own from when
 * it first needs them, which take no signals; it installs no signal handlers and nothing at exit, and
 * stays mapped after dlclose. Only the log callback runs on a thread of the library's.
 *
 * Operations. What may wait has a _start form, which does not. It answers NBL_OK, and *out is an
 * operation, the caller's to be given to nbl_op_free; or what is wrong with its handle or arguments,
 * or NBL_ERR_RESOURCES. All else is the operation's outcome: its descriptor goes into any event loop,
 * and nbl_op_finish tells what the form without _start would have answered.
 *
 * Fork. A client and its idle locks work in a forked child, which opens the store anew when it first
 * uses it. What the parent holds stays the parent's: in the child, nbl_unlock and nbl_refresh answer
 * NBL_ERR_FORKED once, and the lock is idle there after that. The parent notices nothing. A "memory:"
 * store is empty in a child.
 *
 * Holds. Only nbl_unlock and nbl_client_close give a hold back. A lock that is freed, or a program
 * that ends, leaves it to run out. Holds with auto_refresh are renewed until they are unlocked.
 *
 * What a lock cannot promise: a process or machine that is paused may act after its lease ran out,
 * and a server whose clock steps moves every lease. Only a fence that the resource checks closes that
 * gap: see nbl_lock_fence.
 */


#ifndef NBLOCK_H
#define NBLOCK_H

#include <stddef.h>
#include <stdint.h>
// As key_len: the key goes up to its NUL.
#define NBL_CSTR ((size_t)-1)

// The room for a message, its NUL included.
#define NBL_ERROR_MESSAGE_SIZE 256



// As timeout_ms: try once.
#define NBL_NO_WAIT -1

// As timeout_ms: wait for ever.
#define NBL_FOREVER -2

// As auto_refresh or fence: yes.
#define NBL_ON 1

// As auto_refresh or fence: no.
#define NBL_OFF -1

// As if_held: a lock object that is in use already is an error, NBL_ERR_INVALID_OP. The default.
#define NBL_IF_HELD_ERROR 1

// As if_held: wait for one's turn on the lock object, first come first served. For lock objects that
// threads share; nbl_try_lock answers NBL_UNAVAILABLE at once.
#define NBL_IF_HELD_WAIT 2

// As filter: all records. The default.
#define NBL_LIST_ALL 1

// As filter: records whose lease has run out.
#define NBL_LIST_EXPIRED 2

// The version of the interface that this header declares: grows with every addition to it. A library
// of the same soname with an equal or larger one has all that is declared here.
#define NBL_ABI_VERSION 1

// As field: the key.
#define NBL_TEXT_KEY 1

// As field: the key's hash, as NoBrainer stores it: base64 of SHA-1.
#define NBL_TEXT_KEY_HASH 2

// As field, of a record: the holder's host name; empty when the record does not say.
#define NBL_TEXT_HOST 3

// As field, of a record: the boot id of the holder's machine; empty when the record does not say.
#define NBL_TEXT_BOOT_ID 4

// As field, of a record: the holder's app name; empty when the record does not say.
#define NBL_TEXT_APP 5

// As field, of a lock: the instance token of its hold. Whoever has it can end the hold.
#define NBL_TEXT_INSTANCE_TOKEN 6

// As field, of a reentrant lock: its owner token.
#define NBL_TEXT_OWNER_TOKEN 7

// As field, of a record: what is wrong with it, if it is damaged; empty when it is whole. Of a damaged
// record nothing else counts but NBL_TEXT_KEY_HASH, and NBL_TEXT_KEY where that hash is its own. Its key
// stays locked until the record is broken (nbl_break).
#define NBL_TEXT_DAMAGED 8

// As field, of a record: its version, 16 characters that identify this very state of it. It is another
// one after every renewal, and shows no token.
#define NBL_TEXT_VERSION 9

// As level: errors only.
#define NBL_LOG_ERROR 1

// As level: what needs attention, such as a hold that was lost.
#define NBL_LOG_WARN 2

// As level: what is good to know, such as which store is used and why.
#define NBL_LOG_INFO 3

// As level: for finding out what goes on.
#define NBL_LOG_DEBUG 4

// As level: everything.
#define NBL_LOG_TRACE 5

// A client: an open store plus default options. From nbl_client_new; to nbl_client_free.
typedef struct nbl_client_t nbl_client_t;

// Records, as they were found. From nbl_list or nbl_find; to nbl_list_free.
typedef struct nbl_list_t nbl_list_t;

// One program's object for one key. From nbl_lock_new; to nbl_lock_free.
typedef struct nbl_lock_t nbl_lock_t;

// An operation under way. From a function that ends in _start; to nbl_op_free.
typedef struct nbl_op_t nbl_op_t;

// What a call answers. 0 is success, positive an expected outcome, negative a failure. Numbers are
// never reused.
typedef int32_t nbl_status_t;

// Options of a client. NULL, or zero in a field, means the default.
typedef struct nbl_client_options_t {
  // sizeof(nbl_client_options_t).
  uint32_t struct_size;
  // Zero.
  uint32_t reserved;
  // How long a lease lasts, in milliseconds, where a lock does not say: 1 to 31622400000 (366
  // days). Default 60000.
  int64_t expire_ms;
  // How long nbl_lock waits, in milliseconds, where a lock does not say; or NBL_NO_WAIT, or
  // NBL_FOREVER. Default 10000.
  int64_t timeout_ms;
  // Bound of one request to the store, in milliseconds, 1 to 3600000. Default 5000.
  int64_t op_timeout_ms;
  // Bound of opening the store, in milliseconds, 1 to 3600000. Default 5000.
  int64_t connect_timeout_ms;
  // Shown to whoever lists the locks, UTF-8, at most 255 bytes. Default: the program's name.
  const char *app;
} nbl_client_options_t;

// What went wrong, in words. The caller allocates it, sets struct_size, and passes it last; NULL is
// as good. Every call that takes one fills it: with NBL_OK and an empty message when all went well.
typedef struct nbl_error_t {
  // sizeof(nbl_error_t).
  uint32_t struct_size;
  // What the call answered.
  nbl_status_t status;
  // NUL-terminated UTF-8, cut off where it is too long.
  char message[NBL_ERROR_MESSAGE_SIZE];
} nbl_error_t;

// Options of a lock, or of one call on it. NULL, or zero in a field, means: what the lock was made
// with, else what its client was made with.
typedef struct nbl_lock_options_t {
  // sizeof(nbl_lock_options_t).
  uint32_t struct_size;
  // NBL_ON: renew the hold, at a third of its expire, until it is unlocked. Default NBL_OFF.
  int32_t auto_refresh;
  // How long the lease lasts, in milliseconds: 1 to 31622400000 (366 days).
  int64_t expire_ms;
  // How long to wait for a grant, in milliseconds, or NBL_NO_WAIT, or NBL_FOREVER.
  int64_t timeout_ms;
  // NBL_IF_HELD_ERROR or NBL_IF_HELD_WAIT: what to do when this very lock object is in use.
  int32_t if_held;
  // NBL_ON: the grant comes with a fence. Default NBL_OFF; the embedded store gives one anyway.
  int32_t fence;
} nbl_lock_options_t;

// Options of nbl_list. NULL, or zero in a field, means the default.
typedef struct nbl_list_options_t {
  // sizeof(nbl_list_options_t).
  uint32_t struct_size;
  // NBL_LIST_ALL or NBL_LIST_EXPIRED.
  int32_t filter;
} nbl_list_options_t;

// The facts of one record. The caller sets struct_size.
typedef struct nbl_record_t {
  // sizeof(nbl_record_t).
  uint32_t struct_size;
  // The holder's process, or 0 when the record does not say.
  uint32_t pid;
  // How long the lease still runs by the store's clock, in milliseconds; negative when it ran out
  // so long ago, which is at least 1.
  int64_t remaining_ms;
  // Wall-clock time of the lease's end, in milliseconds since 1970.
  uint64_t expires_at_ms;
  // Wall-clock time of the grant, in milliseconds since 1970; 0 when the record does not say.
  uint64_t acquired_at_ms;
  // The fence of the hold; 0 when it has none.
  uint64_t fence;
  // How often a reentrant lock is locked; 0 for a plain lock.
  uint32_t reentrant_count;
  // 1 when the lease has run out, else 0.
  uint32_t expired;
} nbl_record_t;

// Takes a line of the log: its level, NUL-terminated UTF-8 without a line's end, valid during the
// call, and the user pointer of nbl_set_log. Called on a thread of the library's that does nothing
// else, one line at a time. Calls of nbl_* functions inside it answer NBL_ERR_INVALID_OP.
typedef void (*nbl_log_fn)(int32_t level, const char *line, void *user);

// Done. From nbl_lock and nbl_try_lock: the lock is held.
#define NBL_OK 0

// The lock was not granted: somebody else holds it, for as long as the call waited.
#define NBL_UNAVAILABLE 1

// The hold ended without our unlock: its lease ran out and another took it over, or it was broken.
#define NBL_LOST 2

// There is no such record, or it is not any more as it was seen.
#define NBL_NOT_FOUND 3

// The operation is still under way.
#define NBL_PENDING 4

// The operation was cancelled, or its client was closed.
#define NBL_CANCELLED 5

// The hold is past its deadline: others may take it over at any moment.
#define NBL_OVERDUE 6

// The call does not fit the state: already locked, not locked, client closed.
#define NBL_ERR_INVALID_OP -1

// An argument is wrong. Nothing was done.
#define NBL_ERR_INVALID_ARGUMENT -2

// A handle is NULL, was freed, is of another kind, or is none of this library's. Nothing was done.
#define NBL_ERR_BAD_HANDLE -3

// The store could not be reached, or was busy for too long. Nothing was applied.
#define NBL_ERR_UNREACHABLE -4

// No answer came: the request may or may not have been applied.
#define NBL_ERR_INDETERMINATE -5

// The store refused the credentials, or the account may not do this.
#define NBL_ERR_DENIED -6

// The store refused the request, or a record in it is damaged.
#define NBL_ERR_STORE -7

// The hold or the operation belongs to the process that this one was forked from.
#define NBL_ERR_FORKED -8

// A defect of the library.
#define NBL_ERR_INTERNAL -9

// The system gave no memory, thread, descriptor or disk space. Nothing was applied.
#define NBL_ERR_RESOURCES -10

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The name of a status, such as "NBL_LOST"; "NBL_UNKNOWN" for a number that is none. Static text.
// Does not wait.
const char *nbl_status_name(nbl_status_t status);

// The NBL_ABI_VERSION that the library was built with. Does not wait.
uint32_t nbl_abi_version(void);

// The library's version, such as "0.1.0". Static text. Does not wait.
const char *nbl_version(void);

// Opens a store.
//
// url: "embedded:" or "embedded:/directory" (this machine, no server), "memory:" or "memory:NAME"
// (this process, for tests), or "rethinkdb://user:password@host:port,host:port/database?options".
// NULL: what NBLOCK_URL says, else NoBrainer's environment (RETHINKDB_URL and so on), else
// /etc/nblock.conf, else "embedded:". The environment counts for nothing in a program that has more rights
// than its caller (set-user-id). The choice is made here, once: a forked child uses the same store, or its
// calls answer NBL_ERR_DENIED where it may not.
//
// Waits for the store's answer, connect_timeout_ms at most. NBL_OK: *out is the client, for
// nbl_client_free. NBL_ERR_INVALID_ARGUMENT, NBL_ERR_UNREACHABLE, NBL_ERR_DENIED, NBL_ERR_STORE,
// NBL_ERR_RESOURCES.
nbl_status_t nbl_client_new(const char *url,
                            const struct nbl_client_options_t *options,
                            struct nbl_client_t **out,
                            struct nbl_error_t *err);

// nbl_client_new as an operation; nbl_op_take_client has the client. Files of the embedded store are
// opened on the calling thread.
nbl_status_t nbl_client_start(const char *url,
                              const struct nbl_client_options_t *options,
                              struct nbl_op_t **out,
                              struct nbl_error_t *err);

// Closes a client: calls that wait on its locks end with NBL_CANCELLED, holds that are renewed are
// released, other holds run out with their leases, and its locks answer NBL_ERR_INVALID_OP from here
// on. Closing again is no error. The handle stays valid until nbl_client_free.
//
// Waits for the store to take the releases, timeout_ms milliseconds at most; or NBL_NO_WAIT, or
// NBL_FOREVER, or 0 for the client's op_timeout_ms. NBL_OK, or NBL_ERR_INDETERMINATE when that was
// not long enough: what could not be released runs out with its lease. In a forked child it closes the
// child's client alone.
nbl_status_t nbl_client_close(struct nbl_client_t *client,
                              int64_t timeout_ms,
                              struct nbl_error_t *err);

// Frees a client. Without nbl_client_close before, its holds are abandoned: nothing is renewed any
// more, and leases run out. Its locks stay valid handles and answer NBL_ERR_INVALID_OP. NULL is fine.
// Does not wait.
nbl_status_t nbl_client_free(struct nbl_client_t *client);

// Where the client's store is, for people to read, without any password: copied into buffer, which
// has buffer_size bytes. *needed (if not NULL) is the size that it takes, its NUL included; with
// buffer NULL and buffer_size 0 only that is told. NBL_OK; NBL_ERR_INVALID_ARGUMENT: the buffer is too
// small, and nothing was copied, but *needed is written. Does not wait.
nbl_status_t nbl_client_location(struct nbl_client_t *client,
                                 char *buffer,
                                 size_t buffer_size,
                                 size_t *needed,
                                 struct nbl_error_t *err);

// Asks the store for a sign of life. NBL_OK: it gave one. NBL_ERR_UNREACHABLE, NBL_ERR_INDETERMINATE,
// NBL_ERR_DENIED, NBL_ERR_STORE; NBL_ERR_INVALID_OP: the client is closed. Waits op_timeout_ms at most.
nbl_status_t nbl_ping(struct nbl_client_t *client,
                      struct nbl_error_t *err);

// nbl_ping as an operation.
nbl_status_t nbl_ping_start(struct nbl_client_t *client,
                            struct nbl_op_t **out,
                            struct nbl_error_t *err);

// Makes a lock object for a key: 1 byte to 1 MiB of UTF-8, key_len bytes long, or up to its NUL with
// NBL_CSTR. It takes nothing yet. defaults: options of every call on it. NBL_OK: *out is the lock,
// for nbl_lock_free, also after its client was freed. NBL_ERR_INVALID_ARGUMENT; NBL_ERR_INVALID_OP: the
// client is closed. Does not wait.
nbl_status_t nbl_lock_new(struct nbl_client_t *client,
                          const char *key,
                          size_t key_len,
                          const struct nbl_lock_options_t *defaults,
                          struct nbl_lock_t **out,
                          struct nbl_error_t *err);

// Makes a reentrant lock object. Whoever presents the owner token (1 to 255 bytes of UTF-8; NULL:
// random) may lock again, from this object, another one or another process; the record counts, and
// the last unlock deletes it. Any object with the token may unlock. Otherwise as nbl_lock_new.
nbl_status_t nbl_reentrant_lock_new(struct nbl_client_t *client,
                                    const char *key,
                                    size_t key_len,
                                    const char *owner_token,
                                    const struct nbl_lock_options_t *defaults,
                                    struct nbl_lock_t **out,
                                    struct nbl_error_t *err);

// Frees a lock object. A hold is abandoned, not released: it is not renewed any more, its lease runs
// out, and a line is logged. A call on it that is under way ends with NBL_CANCELLED: at once where it
// queues for this object, otherwise when it would be granted, which is given back. NULL is fine. Does
// not wait, and may run in a finaliser, on any thread.
nbl_status_t nbl_lock_free(struct nbl_lock_t *lock);

// Tries once to take the lock. options: NULL, or what is different for this call; its timeout_ms is
// not looked at. NBL_OK: held. NBL_UNAVAILABLE: somebody else holds it. NBL_ERR_INVALID_OP: this
// object holds it already (but see NBL_IF_HELD_WAIT), or its client is closed. NBL_ERR_UNREACHABLE,
// NBL_ERR_INDETERMINATE, NBL_ERR_DENIED, NBL_ERR_STORE, NBL_ERR_RESOURCES: it is not held. Waits for the
// store's answer, op_timeout_ms at most; after a failure nothing stays behind in the store, but for one
// lease at most where the network keeps us from removing it.
nbl_status_t nbl_try_lock(struct nbl_lock_t *lock,
                          const struct nbl_lock_options_t *options,
                          struct nbl_error_t *err);

// Takes the lock, and waits for it timeout_ms at most, in the order in which the threads of this
// process asked. NBL_OK: held. NBL_UNAVAILABLE: not granted in time. NBL_CANCELLED: the client was
// closed, or the lock freed. Otherwise as nbl_try_lock. An outage of the store is waited through; one that lasts longer
// than the timeout answers NBL_ERR_UNREACHABLE or NBL_ERR_INDETERMINATE.
nbl_status_t nbl_lock(struct nbl_lock_t *lock,
                      const struct nbl_lock_options_t *options,
                      struct nbl_error_t *err);

// nbl_lock as an operation, or, with NBL_NO_WAIT as timeout_ms, nbl_try_lock. One that is cancelled
// or freed before nbl_op_finish has told of its grant is released.
nbl_status_t nbl_lock_start(struct nbl_lock_t *lock,
                            const struct nbl_lock_options_t *options,
                            struct nbl_op_t **out,
                            struct nbl_error_t *err);

// Gives the hold back. NBL_OK: it was ours to the end. NBL_LOST: it was not ours any more, which is
// told once. Either way the lock is idle then. NBL_ERR_INDETERMINATE: no answer within op_timeout_ms;
// the lock is idle, and the release goes on in the background. NBL_ERR_FORKED: the hold is the parent
// process's; told once. NBL_ERR_INVALID_OP: not locked. Of a reentrant lock, gives back what was locked
// last; a loss takes everything that this object has locked, and each nbl_unlock of that answers
// NBL_LOST. Waits op_timeout_ms at most.
nbl_status_t nbl_unlock(struct nbl_lock_t *lock,
                        struct nbl_error_t *err);

// nbl_unlock as an operation. Cancelled or freed, it goes on all the same.
nbl_status_t nbl_unlock_start(struct nbl_lock_t *lock,
                              struct nbl_op_t **out,
                              struct nbl_error_t *err);

// Renews the hold: its lease ends expire_ms from now, or, where options name none, as long from now
// as it was given last. It never takes the lock anew. NBL_OK; NBL_LOST: it is not ours any more, told
// once, and the lock is idle; NBL_ERR_INDETERMINATE: no answer within op_timeout_ms, and the hold is
// as it was; NBL_ERR_FORKED: the hold is the parent process's, told once; NBL_ERR_INVALID_OP: not locked.
// Of options only expire_ms is looked at. Waits op_timeout_ms at most.
nbl_status_t nbl_refresh(struct nbl_lock_t *lock,
                         const struct nbl_lock_options_t *options,
                         struct nbl_error_t *err);

// nbl_refresh as an operation. Cancelled or freed, it goes on all the same.
nbl_status_t nbl_refresh_start(struct nbl_lock_t *lock,
                               const struct nbl_lock_options_t *options,
                               struct nbl_op_t **out,
                               struct nbl_error_t *err);

// The state of the lock object: NBL_OK: held. NBL_OVERDUE: held, but past its deadline, so that
// others may take it over at any moment. NBL_LOST: lost, which nbl_unlock or nbl_refresh will tell.
// NBL_PENDING: an acquire or unlock is under way. NBL_ERR_INVALID_OP: idle. NBL_ERR_FORKED: held by
// the parent process. Asks no store: does not wait.
nbl_status_t nbl_lock_state(struct nbl_lock_t *lock);

// How long the hold is certainly ours, in milliseconds; 0 when it is overdue. Counted from before the
// last request left, with a margin: never longer than the store's own lease. NBL_OK; NBL_ERR_INVALID_OP:
// not locked; NBL_LOST, NBL_ERR_FORKED: as nbl_lock_state says, and told again. Does not wait.
nbl_status_t nbl_lock_remaining_ms(struct nbl_lock_t *lock,
                                   uint64_t *out,
                                   struct nbl_error_t *err);

// Wall-clock time at which the hold's lease ends, in milliseconds since 1970: for people to read.
// Answers as nbl_lock_remaining_ms does. Does not wait.
nbl_status_t nbl_lock_expires_at_ms(struct nbl_lock_t *lock,
                                    uint64_t *out,
                                    struct nbl_error_t *err);

// The fence of the hold: a number below 2^53 that grows with every grant of this key, for a resource
// that refuses what comes with a smaller one than it has seen. Where the grant brought none, it is
// asked for now, and the hold is proven before it is handed out: that waits, 2 * op_timeout_ms at
// most. NBL_OK; NBL_LOST; NBL_ERR_INVALID_OP: not locked; NBL_ERR_FORKED; and as nbl_refresh.
nbl_status_t nbl_lock_fence(struct nbl_lock_t *lock,
                            uint64_t *out,
                            struct nbl_error_t *err);

// nbl_lock_fence as an operation; nbl_op_fence has the number.
nbl_status_t nbl_fence_start(struct nbl_lock_t *lock,
                             struct nbl_op_t **out,
                             struct nbl_error_t *err);

// A descriptor that is readable while the hold is overdue or lost, for poll, epoll or an event loop.
// Made on first request, level-triggered, close-on-exec; the library's, open until the lock is freed: do
// not read or close it. A forked child asks for its own. -1 when there is none: a wrong handle, or no
// descriptor could be made. Does not wait.
int32_t nbl_lock_lost_fd(struct nbl_lock_t *lock);

// A text of the lock: NBL_TEXT_KEY, _KEY_HASH, _INSTANCE_TOKEN (of its hold) or _OWNER_TOKEN (of a
// reentrant one), copied as nbl_client_location does. For _INSTANCE_TOKEN, answers as
// nbl_lock_remaining_ms does where there is no hold. Does not wait.
nbl_status_t nbl_lock_text(struct nbl_lock_t *lock,
                           int32_t field,
                           char *buffer,
                           size_t buffer_size,
                           size_t *needed,
                           struct nbl_error_t *err);

// A descriptor that becomes readable when the operation has ended, for poll, epoll or an event loop.
// It is made on first request, level-triggered, close-on-exec, and the library's, open until the
// operation is freed: do not read or close it. -1 when there is none: a wrong handle, an operation of
// the parent process's, or no descriptor could be made. Does not wait.
int32_t nbl_op_fd(struct nbl_op_t *op);

// Waits until the operation has ended, timeout_ms milliseconds at most (or NBL_NO_WAIT, or
// NBL_FOREVER), and answers as nbl_op_finish does: NBL_PENDING when it has not. Any number of threads
// may wait; when the operation is cancelled or freed they wait no longer.
nbl_status_t nbl_op_wait(struct nbl_op_t *op,
                         int64_t timeout_ms,
                         struct nbl_error_t *err);

// What came of the operation: what the call without _start would have answered; NBL_PENDING while it
// is under way; NBL_CANCELLED when it was cancelled; NBL_ERR_FORKED: it is the parent process's. May be
// asked again. From the first time that it answers NBL_OK to an acquire, the hold is the caller's to
// unlock. Does not wait.
nbl_status_t nbl_op_finish(struct nbl_op_t *op,
                           struct nbl_error_t *err);

// Cancels the operation. An acquire is given up, and nothing of it stays in the store; one that was
// granted, but not finished, is released. An unlock or refresh goes on all the same. Cancelling what
// has ended, and was told, changes nothing. NBL_OK; NBL_ERR_FORKED: it is the parent process's, and
// goes on there. Does not wait.
nbl_status_t nbl_op_cancel(struct nbl_op_t *op);

// Frees the operation; one that is under way, or not finished, is cancelled first. NULL is fine.
// Does not wait.
nbl_status_t nbl_op_free(struct nbl_op_t *op);

// The client that nbl_client_start opened, once it has ended with NBL_OK. It can be taken once, and
// is then the caller's to free. NBL_ERR_INVALID_OP: under way, taken already, or of another function.
// Does not wait.
nbl_status_t nbl_op_take_client(struct nbl_op_t *op,
                                struct nbl_client_t **out,
                                struct nbl_error_t *err);

// The records that nbl_list_start or nbl_find_start found, once it has ended with NBL_OK. They can
// be taken once, and are then the caller's to free. NBL_ERR_INVALID_OP: under way, taken already, or of
// another function. Does not wait.
nbl_status_t nbl_op_take_list(struct nbl_op_t *op,
                              struct nbl_list_t **out,
                              struct nbl_error_t *err);

// The fence that nbl_fence_start got, once it has ended with NBL_OK. NBL_ERR_INVALID_OP: under way, or
// of another function. Does not wait.
nbl_status_t nbl_op_fence(struct nbl_op_t *op,
                          uint64_t *out,
                          struct nbl_error_t *err);

// Lists records: all, or those whose lease has run out. NBL_OK: *out is the list, in no particular
// order, for nbl_list_free, also after its client was freed; it may be empty. Fails as nbl_ping does.
// Waits op_timeout_ms at most.
nbl_status_t nbl_list(struct nbl_client_t *client,
                      const struct nbl_list_options_t *options,
                      struct nbl_list_t **out,
                      struct nbl_error_t *err);

// nbl_list as an operation; nbl_op_take_list has the list.
nbl_status_t nbl_list_start(struct nbl_client_t *client,
                            const struct nbl_list_options_t *options,
                            struct nbl_op_t **out,
                            struct nbl_error_t *err);

// Finds the record of a key. NBL_OK: *out is a list of one, for nbl_list_free. NBL_NOT_FOUND: nobody
// has locked it, or whoever did has unlocked it. Fails as nbl_ping does. Waits op_timeout_ms at most.
nbl_status_t nbl_find(struct nbl_client_t *client,
                      const char *key,
                      size_t key_len,
                      struct nbl_list_t **out,
                      struct nbl_error_t *err);

// nbl_find as an operation; nbl_op_take_list has the list of one.
nbl_status_t nbl_find_start(struct nbl_client_t *client,
                            const char *key,
                            size_t key_len,
                            struct nbl_op_t **out,
                            struct nbl_error_t *err);

// How many records a list has: NBL_OK. Does not wait.
nbl_status_t nbl_list_length(struct nbl_list_t *list, size_t *out, struct nbl_error_t *err);

// The facts of the record at index, counted from 0. out->struct_size says how much of it the caller
// knows; what the library does not know is set to zero. NBL_OK; NBL_ERR_INVALID_ARGUMENT: no such
// index, or no such size. Does not wait.
nbl_status_t nbl_list_record(struct nbl_list_t *list,
                             size_t index,
                             struct nbl_record_t *out,
                             struct nbl_error_t *err);

// A text of the record at index: NBL_TEXT_KEY, _KEY_HASH, _HOST, _BOOT_ID, _APP, _DAMAGED or _VERSION,
// copied as nbl_client_location does. A key may contain NUL: *needed says how long it is. Does not wait.
nbl_status_t nbl_list_text(struct nbl_list_t *list,
                           size_t index,
                           int32_t field,
                           char *buffer,
                           size_t buffer_size,
                           size_t *needed,
                           struct nbl_error_t *err);

// Frees a list. NULL is fine. Does not wait.
nbl_status_t nbl_list_free(struct nbl_list_t *list);

// Breaks by force: deletes the record at index if it still is as it was found, so that nothing is
// broken which was not looked at. To break one hold and no other, find the record, compare its fence,
// its holder or its version (NBL_TEXT_VERSION) with what was seen before, and break it through that
// list. Its holder, if there is one, finds its hold lost. NBL_OK; NBL_NOT_FOUND: it has changed, as with
// every renewal, or is gone. Fails as nbl_ping does. Waits op_timeout_ms at most.
nbl_status_t nbl_break(struct nbl_list_t *list,
                       size_t index,
                       struct nbl_error_t *err);

// nbl_break as an operation.
nbl_status_t nbl_break_start(struct nbl_list_t *list,
                             size_t index,
                             struct nbl_op_t **out,
                             struct nbl_error_t *err);

// Has callback called with every line that is logged, up to level (NBL_LOG_...). NULL: no more; a
// call that is running is waited for, and user is not used after that. Without a callback, lines go to
// standard error if the environment's NBLOCK_LOG names a level (error, warn, info, debug, trace). Lines
// that come faster than the callback takes them are dropped, so that nobody waits for it. NBL_OK;
// NBL_ERR_INVALID_ARGUMENT: no such level; NBL_ERR_INVALID_OP: called from the callback.
nbl_status_t nbl_set_log(nbl_log_fn callback,
                         void *user,
                         int32_t level);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* NBLOCK_H */
