/* What the C and C++ test programs check with: the first thing that is not so ends the program, and says where. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nblock.h>

/* The error detail of the calls that a test looks at. One for each thread. */
static _Thread_local nbl_error_t err = NBL_ERROR_INIT;

#define CHECK(condition) \
    ((condition) ? (void)0 : check_failed(__FILE__, __LINE__, "not so: " #condition, err.message))

/* The call answers that status, and where it was given err, err says the same and has words for it. */
#define ANSWERS(status, call) check_answer(__FILE__, __LINE__, #call, (call), (status))

/* As ANSWERS, and the words contain that text. */
#define SAYS(text, status, call) \
    (ANSWERS(status, call), \
     strstr(err.message, (text))                                                                   \
         ? (void)0                                                                                 \
         : check_failed(__FILE__, __LINE__, "does not say \"" text "\": " #call, err.message))

static inline void check_failed(const char *file, int line, const char *what, const char *message)
{
    fprintf(stderr, "%s:%d: %s (last message: \"%s\")\n", file, line, what, message);
    abort();
}

static inline void check_answer(const char *file, int line, const char *call, nbl_status_t got, nbl_status_t wanted)
{
    if (got != wanted) {
        fprintf(stderr, "%s:%d: %s answered %s instead of %s: \"%s\"\n", file, line, call, nbl_status_name(got),
                nbl_status_name(wanted), err.message);
        abort();
    }
    if (strstr(call, "&err")) {
        if (err.status != got)
            check_failed(file, line, "err has another status than the call answered", err.message);
        if ((got < 0) != (err.message[0] != '\0') && got <= 0)
            check_failed(file, line, "a failure has words, a success has none", err.message);
    }
}

/* The lock is in that state. */
#define IS_IN_STATE(state, lock) CHECK(state_of(lock) == (state))

static inline nbl_lock_state_t state_of(nbl_lock_t *lock)
{
    nbl_lock_state_t state = 0;
    ANSWERS(NBL_OK, nbl_lock_state(lock, &state, &err));
    return state;
}

/* A client of a store, for which nothing may go wrong. */
static inline nbl_client_t *open_client(const char *url)
{
    nbl_client_t *client = NULL;
    ANSWERS(NBL_OK, nbl_client_new(url, NULL, &client, &err));
    return client;
}

static inline nbl_lock_t *open_lock(nbl_client_t *client, const char *key, const nbl_lock_options_t *defaults)
{
    nbl_lock_t *lock = NULL;
    ANSWERS(NBL_OK, nbl_lock_new(client, key, NBL_CSTR, defaults, &lock, &err));
    return lock;
}

/* Ends a forked child well: as another program, since a child leaves alone what was its parent's, and
 * a leak checker would count that. */
static inline void end_child(void)
{
    execl("/bin/true", "true", (char *)NULL);
    _exit(127);
}

#endif
