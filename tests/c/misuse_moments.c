/*
 * Calls at the wrong moment: before and after their time, on what was freed beneath them, in a forked
 * child, and when no descriptor is left.
 */
#include <pthread.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "check.h"

/* Calls that fit no state, and operations asked for what they have not. */
static void wrong_moments(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "moment", NULL);
    uint64_t number = 0;
    ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(lock, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_refresh(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_remaining_ms(lock, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_expires_at_ms(lock, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_fence(lock, &number, &err));
    ANSWERS(NBL_OK, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_try_lock(lock, NULL, &err));

    /* An acquire that must wait: what it has not yet, what it never has, and its end by a cancel. */
    nbl_lock_t *other = open_lock(client, "moment", NULL);
    nbl_op_t *op = NULL, *second = NULL;
    nbl_client_t *no_client = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_PENDING, nbl_op_finish(op, &err));
    ANSWERS(NBL_PENDING, nbl_op_wait(op, NBL_NO_WAIT, &err));
    ANSWERS(NBL_PENDING, nbl_op_take_client(op, &no_client, &err));
    ANSWERS(NBL_PENDING, nbl_op_take_list(op, &list, &err));
    ANSWERS(NBL_PENDING, nbl_op_take_fence(op, &number, &err));
    IS_IN_STATE(NBL_STATE_PENDING, other);
    ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(other, &err));
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &second, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_wait(second, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_op_free(second));
    CHECK(nbl_op_fd(op) >= 0 && nbl_op_fd(op) == nbl_op_fd(op));
    ANSWERS(NBL_OK, nbl_op_cancel(op));
    ANSWERS(NBL_OK, nbl_op_cancel(op));
    ANSWERS(NBL_CANCELLED, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_CANCELLED, nbl_op_take_list(op, &list, &err));
    IS_IN_STATE(NBL_STATE_IDLE, other);
    ANSWERS(NBL_OK, nbl_op_free(op));

    /* The lock is freed under an acquire, which gives back what it gets; then the client under another. */
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    nbl_lock_state_t none = 0;
    SAYS("was freed", NBL_ERR_BAD_HANDLE, nbl_lock_state(other, &none, &err));
    CHECK(none == 0);
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    CHECK(nbl_op_wait(op, NBL_FOREVER, &err) != NBL_OK);
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock(lock, NULL, &err));

    ANSWERS(NBL_OK, nbl_list_start(client, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_fence(op, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_client(op, &no_client, &err));
    ANSWERS(NBL_OK, nbl_op_take_list(op, &list, &err));
    nbl_list_t *again = NULL;
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_list(op, &again, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    SAYS("(got 18446744073709551615)", NBL_ERR_INVALID_ARGUMENT, nbl_break(list, SIZE_MAX, &err));
    nbl_record_t record = {.struct_size = sizeof record};
    ANSWERS(NBL_ERR_INVALID_ARGUMENT, nbl_list_record(list, SIZE_MAX / 2, &record, &err));

    other = open_lock(client, "moment", NULL);
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
    ANSWERS(NBL_CANCELLED, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    /* Locks and lists outlive their client, and say so. */
    SAYS("client is closed", NBL_ERR_INVALID_OP, nbl_try_lock(other, NULL, &err));
    SAYS("client is closed", NBL_ERR_INVALID_OP, nbl_break(list, 0, &err));
    ANSWERS(NBL_OK, nbl_list_record(list, 0, &record, &err));
    CHECK(strlen(record.key) == record.key_len && strlen(record.key_hash) == 28);
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    ANSWERS(NBL_OK, nbl_lock_free(lock));

    client = open_client("memory:");
    lock = open_lock(client, "moment", NULL);
    ANSWERS(NBL_OK, nbl_client_close(client, INT64_MAX, &err));
    ANSWERS(NBL_OK, nbl_client_close(client, NBL_FOREVER, &err));
    nbl_ping_t ping = NBL_PING_INIT;
    ANSWERS(NBL_ERR_INVALID_OP, nbl_client_ping(client, &ping, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_new(client, "k", 1, NULL, &other, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
}

/* In a forked child: every handle of the parent's may be used and freed, and nothing of it is disturbed. */
static void in_a_child(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *held = open_lock(client, "forked", NULL), *waiting = open_lock(client, "forked", NULL);
    nbl_op_t *op = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    ANSWERS(NBL_OK, nbl_lock_start(waiting, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        ANSWERS(NBL_ERR_FORKED, nbl_op_finish(op, &err));
        ANSWERS(NBL_ERR_FORKED, nbl_op_wait(op, NBL_FOREVER, &err));
        ANSWERS(NBL_ERR_FORKED, nbl_op_cancel(op));
        CHECK(nbl_op_fd(op) == -1);
        ANSWERS(NBL_OK, nbl_op_free(op));
        IS_IN_STATE(NBL_STATE_FORKED, held);
        ANSWERS(NBL_ERR_FORKED, nbl_unlock(held, &err));
        ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(held, &err));
        ANSWERS(NBL_OK, nbl_lock_free(held));
        ANSWERS(NBL_OK, nbl_lock_free(waiting));
        ANSWERS(NBL_OK, nbl_list_free(list));
        ANSWERS(NBL_OK, nbl_client_free(client));
        ANSWERS(NBL_ERR_BAD_HANDLE, nbl_client_free(client));
        end_child();
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ANSWERS(NBL_PENDING, nbl_op_finish(op, &err));
    ANSWERS(NBL_OK, nbl_unlock(held, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_unlock(waiting, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_lock_free(waiting));
    ANSWERS(NBL_OK, nbl_lock_free(held));
    ANSWERS(NBL_OK, nbl_client_close(client, 0, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* No descriptor is left: what needs one says so, the rest goes on. */
static void without_descriptors(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "descriptors", NULL);
    nbl_op_t *op = NULL;
    struct rlimit before, none;
    ANSWERS(NBL_OK, nbl_client_ping_start(client, &op, &err));
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none = before;
    none.rlim_cur = 0;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK(nbl_op_fd(op) == -1 && nbl_lock_lost_fd(lock) == -1);
    ANSWERS(NBL_OK, nbl_try_lock(lock, NULL, &err));
    CHECK(nbl_lock_lost_fd(lock) == -1);
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK(nbl_op_fd(op) >= 0 && nbl_lock_lost_fd(lock) >= 0);
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* Calls of a thread that is to be cancelled: not in a call, where that would end the program. */
static void *is_to_be_cancelled(void *url)
{
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    pthread_cancel(pthread_self());
    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "cancelled", NULL);
    ANSWERS(NBL_OK, nbl_try_lock(lock, NULL, &err));
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    CHECK(nbl_lock_free(lock) == NBL_OK);
    CHECK(nbl_client_free(client) == NBL_OK);
    int state = PTHREAD_CANCEL_ENABLE + PTHREAD_CANCEL_DISABLE + 1;
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state);
    CHECK(state == PTHREAD_CANCEL_ENABLE);
    return url;
}

static void cancelled(const char *url)
{
    pthread_t thread;
    void *end = NULL;
    CHECK(pthread_create(&thread, NULL, is_to_be_cancelled, (void *)(uintptr_t)url) == 0);
    CHECK(pthread_join(thread, &end) == 0);
    CHECK(end == url);
}

int main(void)
{
    static const char *const stores[] = {"memory:", "embedded:"};
    for (int i = 0; i < 2; i++) {
        wrong_moments(stores[i]);
        in_a_child(stores[i]);
        without_descriptors(stores[i]);
        cancelled(stores[i]);
    }
    return 0;
}
