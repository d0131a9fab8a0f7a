/*
 * A process that gets no threads: what needs one answers NBL_ERR_RESOURCES, the rest works, nothing
 * hangs, and when there are threads again all is well.
 */
#include <signal.h>
#include <sys/resource.h>

#include "check.h"

static sigset_t mask_at_start;

static void limit_threads(rlim_t most)
{
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NPROC, &limit) == 0);
    limit.rlim_cur = most;
    CHECK(setrlimit(RLIMIT_NPROC, &limit) == 0);
}

static void mask_is_as_before(void)
{
    sigset_t now;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &now) == 0);
    for (int signal = 1; signal < NSIG; signal++)
        CHECK(sigismember(&now, signal) == sigismember(&mask_at_start, signal));
}

static void log_line(int32_t level, const char *line, void *user)
{
    (void)level, (void)line, (void)user;
}

static void without_threads(nbl_client_t *client)
{
    nbl_lock_t *held = open_lock(client, "starved", NULL), *other = open_lock(client, "starved", NULL);
    nbl_lock_options_t renewed = {.struct_size = sizeof renewed, .auto_refresh = NBL_ON};
    nbl_op_t *op = NULL;
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    ANSWERS(NBL_UNAVAILABLE, nbl_try_lock(other, NULL, &err));
    SAYS("threads could not be started", NBL_ERR_RESOURCES, nbl_lock(other, NULL, &err));
    mask_is_as_before();
    nbl_status_t started = nbl_lock_start(other, NULL, &op, &err);
    if (started == NBL_OK)
        started = nbl_op_wait(op, NBL_FOREVER, &err);
    CHECK(started == NBL_ERR_RESOURCES);
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_unlock(held, &err));
    /* A hold that nobody would renew is not what was asked for. */
    ANSWERS(NBL_ERR_RESOURCES, nbl_lock(held, &renewed, &err));
    IS_IN_STATE(NBL_STATE_IDLE, held);
    ANSWERS(NBL_OK, nbl_try_lock(other, NULL, &err));
    ANSWERS(NBL_OK, nbl_unlock(other, &err));
    mask_is_as_before();
    ANSWERS(NBL_OK, nbl_lock_free(held));
    ANSWERS(NBL_OK, nbl_lock_free(other));
}

int main(void)
{
    alarm(60);
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &mask_at_start) == 0);
    nbl_client_t *client = open_client("memory:");
    /* The superuser is not limited. A user that nobody else is has one thread: this one. */
    int alone = getuid() == 0;
    if (alone)
        CHECK(setgid(54321) == 0 && setuid(54321) == 0);
    struct rlimit before;
    CHECK(getrlimit(RLIMIT_NPROC, &before) == 0);
    limit_threads(0);
    without_threads(client);
    CHECK(nbl_log_set(log_line, NULL, NBL_LOG_ERROR) == NBL_ERR_RESOURCES);
    if (alone) {
        /* One thread, and not the two that are wanted. */
        limit_threads(2);
        without_threads(client);
    }
    limit_threads(before.rlim_cur);
    nbl_lock_t *held = open_lock(client, "starved", NULL), *other = open_lock(client, "starved", NULL);
    nbl_op_t *op = NULL;
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_unlock(held, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_unlock(other, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock_free(held));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    ANSWERS(NBL_OK, nbl_client_free(client));
    return 0;
}
