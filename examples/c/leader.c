/*
 * One of many leads, and stops at once when it loses the lead.
 *
 *     leader NAME
 *
 * SIGTERM and SIGINT end it, and hand the lead over.
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

/* Waits to be elected: 1; or until a signal comes: 0; -1 after an error. */
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
    nbl_op_free(op); /* what was not finished is given up, and given back */
    return status == NBL_OK ? 1 : status == NBL_CANCELLED ? 0 : -1;
}

/* Leads until the lead is lost, 1, or a signal comes, 0. */
static int lead(const char *name, nbl_lock_t *lock, int signals)
{
    uint64_t fence = 0;
    if (nbl_lock_fence(lock, &fence, &err) != NBL_OK)
        return 1;
    printf("%s leads, fence %llu\n", name, (unsigned long long)fence);
    fflush(stdout);
    struct pollfd both[] = {{.fd = nbl_lock_lost_fd(lock), .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    for (;;) {
        /* One round of what a leader does. It hands the fence to whatever it writes to. */
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
    /* Renewed every second: when this process dies, another one leads 3 s later. */
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
        /* Tells a loss, once; not locked when no election was won. */
        if (leads && nbl_unlock(lock, &err) < 0)
            return failed(name);
    }
    printf("%s ends\n", name);
    nbl_lock_free(lock);
    nbl_client_close(client, 0, NULL);
    nbl_client_free(client);
    return 0;
}
