/*
 * Of several processes, the one that holds the lock leads. It stops leading as soon as it knows that the lock is lost.
 *
 *     leader NAME
 *
 * SIGTERM and SIGINT end it; another process then gets the lead.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <nblock.h>

static nbl_error_t err = NBL_ERROR_INIT;

static int failed(const char *name)
{
    fprintf(stderr, "%s: %s\n", name, err.message);
    return 1;
}

static int readable(int descriptor, int timeout_ms)
{
    struct pollfd one = {.fd = descriptor, .events = POLLIN};
    return poll(&one, 1, timeout_ms) > 0;
}

/* Waits for the lead. Returns 1 if it was elected, 0 if a signal arrived, -1 after an error. */
static int elected(const char *name, nbl_lock_t *lock, int signals)
{
    nbl_op_t *op = NULL;
    if (nbl_lock_start(lock, NULL, &op, &err) != NBL_OK)
        return -1;
    printf("%s stands for election\n", name);
    fflush(stdout);
    struct pollfd both[] = {{.fd = nbl_op_fd(op), .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    while (poll(both, 2, -1) < 0) {
    }
    nbl_status_t status = both[1].revents ? NBL_CANCELLED : nbl_op_finish(op, &err);
    nbl_op_free(op); /* an unfinished acquire is given up, and a grant that was not reported is released */
    return status == NBL_OK ? 1 : status == NBL_CANCELLED ? 0 : -1;
}

/* Leads. Returns 1 if the lead was lost, 0 if a signal arrived. */
static int lead(const char *name, nbl_lock_t *lock, int signals)
{
    uint64_t fence = 0;
    if (nbl_lock_fence(lock, &fence, &err) != NBL_OK)
        return 1;
    printf("%s leads, fence %llu\n", name, (unsigned long long)fence);
    fflush(stdout);
    struct pollfd both[] = {{.fd = nbl_lock_lost_fd(lock), .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (;;) {
        /* One round of the leader's work. It sends the fence with everything that it writes. */
        if (poll(both, 2, 100) <= 0)
            continue;
        return both[1].revents ? 0 : 1;
    }
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: leader NAME\n");
        return 64;
    }
    const char *name = argv[1];
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);

    nbl_client_t *client = NULL;
    nbl_lock_t *lock = NULL;
    /* Renewed every second: if this process dies, another one leads 3 s later at most. */
    nbl_lock_options_t options = {
        .struct_size = sizeof options, .expire_ms = 3000, .timeout_ms = NBL_FOREVER, .auto_refresh = NBL_ON};
    if (nbl_client_new(NULL, NULL, &client, &err) != NBL_OK ||
        nbl_lock_new(client, "leader", NBL_CSTR, &options, &lock, &err) != NBL_OK)
        return failed(name);
    while (!readable(signals, 0)) {
        int leads = elected(name, lock, signals);
        if (leads < 0)
            return failed(name);
        if (leads && lead(name, lock, signals)) {
            printf("%s has lost the lead\n", name);
            fflush(stdout);
        }
        /* Reports a loss, once. Without a won election, there is nothing to unlock. */
        if (leads && nbl_unlock(lock, &err) < 0)
            return failed(name);
    }
    printf("%s ends\n", name);
    nbl_lock_free(lock);
    nbl_client_close(client, 0, NULL);
    nbl_client_free(client);
    return 0;
}
