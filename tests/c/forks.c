/*
 * Forks in the handler of a signal that interrupts calls of the library, at any of their instructions: the call is the
 * parent's, the child's ends with NBL_ERR_FORKED, and the store is whole for all. Argument: how many forks.
 *
 * One thread, and nobody else uses the keys: in a program with several, a fork inside malloc hangs in the C library.
 */
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "check.h"

static volatile sig_atomic_t is_child, forks;
static int ended, told;

static void fork_now(int signal_number)
{
    (void)signal_number;
    pid_t child = fork();
    if (child == 0) {
        is_child = 1;
        signal(SIGALRM, SIG_DFL);
        alarm(60);
        /* By then its parent has ended the call, and waits: the two never want the mutex at once, which would start
           the library's threads. */
        usleep(2000);
    } else if (child > 0) {
        forks++;
    }
}

/* Ends the child: 0 when its call got "forked", 3 when the fork was between two calls. What its parent was granted is
   not the child's, who could give it back. */
static void leave(nbl_lock_t *lock, nbl_status_t status)
{
    nbl_lock_state_t state;
    if (status == NBL_ERR_FORKED
        && (nbl_lock_state(lock, &state, NULL) != NBL_OK || state == NBL_STATE_HELD
            || nbl_unlock(lock, NULL) == NBL_OK))
        _exit(1);
    if (status == NBL_OK && nbl_unlock(lock, NULL) != NBL_OK) {
        /* The child ends in any case. */
    }
    _exit(status == NBL_ERR_FORKED ? 0 : status == NBL_OK || status == NBL_UNAVAILABLE ? 3 : 1);
}

static void reap(void)
{
    int status;
    if (is_child)
        _exit(3);
    while (waitpid(-1, &status, 0) > 0) {
        /* By signal 14: it hung. */
        CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 3));
        ended++;
        told += WEXITSTATUS(status) == 0;
    }
}

static void cycles(nbl_client_t *client, const char *key, int count)
{
    nbl_lock_t *lock;
    CHECK(nbl_lock_new(client, key, NBL_CSTR, NULL, &lock, NULL) == NBL_OK);
    for (int cycle = 0; cycle < count; cycle++) {
        CHECK(nbl_try_lock(lock, NULL, NULL) == NBL_OK);
        CHECK(nbl_unlock(lock, NULL) == NBL_OK);
    }
    CHECK(nbl_lock_free(lock) == NBL_OK);
}

int main(int count, char **arguments)
{
    int wanted = count > 1 ? atoi(arguments[1]) : 1000;
    nbl_client_t *client;
    nbl_lock_t *lock;
    CHECK(nbl_client_new("embedded:", NULL, &client, NULL) == NBL_OK);
    CHECK(nbl_lock_new(client, "forks", NBL_CSTR, NULL, &lock, NULL) == NBL_OK);
    struct sigaction action = {.sa_handler = fork_now, .sa_flags = SA_RESTART};
    CHECK(sigaction(SIGALRM, &action, NULL) == 0);
    sigset_t alarms;
    CHECK(sigemptyset(&alarms) == 0 && sigaddset(&alarms, SIGALRM) == 0);
    while (forks < wanted) {
        /* Once in each cycle, so that the handler leaves time for the cycle. Not in a child, which it would end: none is
           forked between the two. */
        struct itimerval once = {.it_value = {.tv_usec = 1 + rand() % 300}};
        CHECK(sigprocmask(SIG_BLOCK, &alarms, NULL) == 0);
        if (is_child)
            _exit(3);
        CHECK(setitimer(ITIMER_REAL, &once, NULL) == 0);
        CHECK(sigprocmask(SIG_UNBLOCK, &alarms, NULL) == 0);
        for (int cycle = 0; cycle < 20; cycle++) {
            if (is_child)
                _exit(3);
            nbl_status_t status = nbl_try_lock(lock, NULL, &err);
            if (is_child)
                leave(lock, status);
            reap();
            CHECK(status == NBL_OK);
            status = nbl_unlock(lock, &err);
            if (is_child)
                leave(lock, status);
            reap();
            CHECK(status == NBL_OK);
        }
    }
    struct itimerval never = {0};
    CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
    if (is_child)
        _exit(3);
    reap();
    CHECK(ended == forks);
    printf("    %d forks, %d of them in the middle of a call\n", ended, told);
    CHECK(told > 0);

    cycles(client, "after", 1000);
    pid_t child = fork();
    if (child == 0) {
        cycles(client, "forks", 1000);
        _exit(0);
    }
    reap();
    CHECK(nbl_lock_free(lock) == NBL_OK);
    CHECK(nbl_client_free(client) == NBL_OK);
    return 0;
}
