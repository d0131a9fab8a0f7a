/*
 * Threads that call every function while others free what they call it on; calls inside the log
 * callback, and the callback taken away while it runs. Argument: how many rounds.
 */
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/wait.h>

#include "calls.h"

enum { CALLERS = 4, KEYS = 3 };

/* What the threads fight over: handles that come and go under them. */
static _Atomic(nbl_client_t *) clients[2];
static _Atomic(nbl_lock_t *) locks[KEYS];
static _Atomic(nbl_op_t *) ops[KEYS];
static _Atomic(nbl_list_t *) lists[1];
static atomic_bool stop;
static atomic_uint answers_of_the_dead, answers_of_the_living;

static void count(nbl_status_t status)
{
    CHECK(status != NBL_ERR_INTERNAL && status != NBL_ERR_FORKED);
    CHECK(strcmp(nbl_status_name(status), "NBL_UNKNOWN") != 0);
    atomic_fetch_add(status == NBL_ERR_BAD_HANDLE ? &answers_of_the_dead : &answers_of_the_living, 1);
}

/* Calls everything but what frees or closes a client: that is left to the main thread, so that things live a while. */
static void *caller(void *seed)
{
    unsigned random = (unsigned)(uintptr_t)seed;
    while (!atomic_load(&stop)) {
        random = random * 1103515245 + 12345;
        unsigned pick = random >> 16;
        switch (pick % 4) {
        case 0: count(client_call(2 + pick / 4 % (CLIENT_CALLS - 2), atomic_load(&clients[pick % 2]))); break;
        case 1: count(lock_call(1 + pick / 4 % (LOCK_CALLS - 1), atomic_load(&locks[pick % KEYS]))); break;
        case 2: count(op_call(1 + pick / 4 % (OP_CALLS - 1), atomic_load(&ops[pick % KEYS]))); break;
        default: count(list_call(1 + pick / 4 % (LIST_CALLS - 1), atomic_load(&lists[0])));
        }
    }
    return NULL;
}

/* Gives the callers new handles and frees the old ones under them, clients with all that hangs on them. */
static void handles_come_and_go(const char *url, int rounds)
{
    static const char *const keys[KEYS] = {"race:a", "race:b", "race:c"};
    pthread_t threads[CALLERS];
    atomic_store(&stop, false);
    for (int i = 0; i < 2; i++)
        atomic_store(&clients[i], open_client(url));
    for (uintptr_t i = 0; i < CALLERS; i++)
        CHECK(pthread_create(&threads[i], NULL, caller, (void *)(i + 1)) == 0);
    for (int round = 0; round < rounds; round++) {
        nbl_client_t *client = atomic_load(&clients[round % 2]);
        nbl_lock_options_t options = {.struct_size = sizeof options, .expire_ms = 200, .timeout_ms = 20};
        options.auto_refresh = round % 3 ? NBL_ON : NBL_OFF;
        options.if_held = round % 5 ? NBL_IF_HELD_WAIT : NBL_IF_HELD_ERROR;
        for (int i = 0; i < KEYS; i++) {
            nbl_lock_t *lock = NULL;
            nbl_op_t *op = NULL;
            nbl_list_t *list = NULL;
            if (i == 2)
                ANSWERS(NBL_OK, nbl_reentrant_lock_new(client, keys[i], NBL_CSTR, "owner", &options, &lock, &err));
            else
                ANSWERS(NBL_OK, nbl_lock_new(client, keys[i], NBL_CSTR, &options, &lock, &err));
            CHECK(nbl_lock_start(lock, NULL, &op, &err) == NBL_OK);
            if (nbl_list(client, NULL, &list, &err) == NBL_OK)
                nbl_list_free(atomic_exchange(&lists[0], list));
            nbl_lock_free(atomic_exchange(&locks[i], lock));
            nbl_op_free(atomic_exchange(&ops[i], op));
        }
        if (round % 4 == 3) {
            nbl_client_t *before = atomic_exchange(&clients[round % 2], open_client(url));
            if (round % 8 == 3)
                CHECK(nbl_client_close(before, 5000, &err) == NBL_OK);
            ANSWERS(NBL_OK, nbl_client_free(before));
        }
        sched_yield();
    }
    atomic_store(&stop, true);
    for (int i = 0; i < CALLERS; i++)
        CHECK(pthread_join(threads[i], NULL) == 0);
    for (int i = 0; i < KEYS; i++) {
        nbl_op_free(atomic_exchange(&ops[i], NULL));
        nbl_lock_free(atomic_exchange(&locks[i], NULL));
    }
    nbl_list_free(atomic_exchange(&lists[0], NULL));
    for (int i = 0; i < 2; i++) {
        nbl_client_t *client = atomic_exchange(&clients[i], NULL);
        ANSWERS(NBL_OK, nbl_client_close(client, 5000, &err));
        ANSWERS(NBL_OK, nbl_client_free(client));
    }
}

/* All threads free the same handle at once: one of them did it. */
static pthread_barrier_t together;
static atomic_uint freed;

static void *freer(void *handle)
{
    pthread_barrier_wait(&together);
    nbl_status_t status = nbl_lock_free(handle);
    CHECK(status == NBL_OK || status == NBL_ERR_BAD_HANDLE);
    if (status == NBL_OK)
        atomic_fetch_add(&freed, 1);
    return NULL;
}

static void everybody_frees_it(const char *url, int rounds)
{
    nbl_client_t *client = open_client(url);
    CHECK(pthread_barrier_init(&together, NULL, CALLERS) == 0);
    for (int round = 0; round < rounds; round++) {
        pthread_t threads[CALLERS];
        nbl_lock_t *lock = open_lock(client, "freed by all", NULL);
        /* Held, so that freeing it has something to do. Its lease is over before the next one asks. */
        nbl_lock_options_t brief = {.struct_size = sizeof brief, .expire_ms = 1, .timeout_ms = 5000};
        ANSWERS(NBL_OK, nbl_lock(lock, &brief, &err));
        atomic_store(&freed, 0);
        for (int i = 0; i < CALLERS; i++)
            CHECK(pthread_create(&threads[i], NULL, freer, lock) == 0);
        for (int i = 0; i < CALLERS; i++)
            CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(atomic_load(&freed) == 1);
    }
    CHECK(pthread_barrier_destroy(&together) == 0);
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* A thread waits, in a call or for an operation, and what it waits on is freed. */
static atomic_int waiting;

static void *waits_in_lock(void *lock)
{
    nbl_lock_options_t options = {.struct_size = sizeof options, .timeout_ms = NBL_FOREVER};
    atomic_fetch_add(&waiting, 1);
    return (void *)(intptr_t)nbl_lock(lock, &options, &err);
}

static void *waits_in_wait(void *op)
{
    atomic_fetch_add(&waiting, 1);
    /* The default: as long as the operation takes. */
    return (void *)(intptr_t)nbl_op_wait(op, 0, &err);
}

static void freed_under_a_waiter(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *holder = open_lock(client, "waited for", NULL);
    ANSWERS(NBL_OK, nbl_lock(holder, NULL, &err));
    nbl_lock_t *lock = open_lock(client, "waited for", NULL), *other = open_lock(client, "waited for", NULL);
    nbl_op_t *op = NULL;
    nbl_lock_options_t forever = {.struct_size = sizeof forever, .timeout_ms = NBL_FOREVER};
    ANSWERS(NBL_OK, nbl_lock_start(other, &forever, &op, &err));
    pthread_t in_lock, in_wait;
    atomic_store(&waiting, 0);
    CHECK(pthread_create(&in_lock, NULL, waits_in_lock, lock) == 0);
    CHECK(pthread_create(&in_wait, NULL, waits_in_wait, op) == 0);
    while (atomic_load(&waiting) < 2 || state_of(lock) != NBL_STATE_PENDING)
        sched_yield();
    void *answer = NULL;
    ANSWERS(NBL_OK, nbl_op_free(op));
    CHECK(pthread_join(in_wait, &answer) == 0);
    /* Freed before it could look, or while it waited. */
    CHECK((intptr_t)answer == NBL_CANCELLED || (intptr_t)answer == NBL_ERR_BAD_HANDLE);
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    ANSWERS(NBL_OK, nbl_unlock(holder, &err));
    CHECK(pthread_join(in_lock, &answer) == 0);
    CHECK((intptr_t)answer != NBL_OK);
    /* What it was granted nobody could have unlocked: it was given back. */
    ANSWERS(NBL_OK, nbl_lock(holder, NULL, &err));
    ANSWERS(NBL_OK, nbl_unlock(holder, &err));
    ANSWERS(NBL_OK, nbl_lock_free(holder));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* The log callback: what it calls is refused, and after it was unset it runs no more. */
static nbl_client_t *client_in_callback;
static nbl_lock_t *lock_in_callback;
static atomic_int lines;
static atomic_bool inside, leave, unset;
static int user_data;

static void callback(int32_t level, const char *line, void *user)
{
    CHECK(level >= NBL_LOG_ERROR && level <= NBL_LOG_TRACE && line[0] != '\0' && !strchr(line, '\n'));
    CHECK(user == &user_data);
    if (atomic_fetch_add(&lines, 1) > 0)
        return;
    const nbl_status_t refused = NBL_ERR_INVALID_OP;
    for (unsigned which = 0; which < CLIENT_CALLS; which++)
        ANSWERS(refused, client_call(which, client_in_callback));
    for (unsigned which = 0; which < LOCK_CALLS; which++)
        ANSWERS(which == 13 ? NBL_ERR_BAD_HANDLE : refused, lock_call(which, lock_in_callback));
    CHECK(nbl_log_set(NULL, NULL, 0) == refused);
    CHECK(nbl_client_new("memory:", NULL, &client_in_callback, &err) == refused);
    CHECK(nbl_abi_version() == NBL_ABI_VERSION && nbl_version()[0]);
    /* A child that is forked in here has a thread like any other. */
    pid_t child = fork();
    if (child == 0) {
        nbl_ping_t ping = NBL_PING_INIT;
        ANSWERS(NBL_OK, nbl_client_ping(client_in_callback, &ping, &err));
        end_child();
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    atomic_store(&inside, true);
    while (!atomic_load(&leave))
        sched_yield();
}


static void *unsets(void *nothing)
{
    (void)nothing;
    CHECK(nbl_log_set(NULL, NULL, 0) == NBL_OK);
    CHECK(atomic_load(&leave));
    atomic_store(&unset, true);
    return NULL;
}

static void log_callback(const char *url)
{
    atomic_store(&lines, 0);
    atomic_store(&unset, false);
    atomic_store(&inside, false);
    atomic_store(&leave, false);
    CHECK(nbl_log_set(callback, &user_data, -1) == NBL_ERR_INVALID_ARGUMENT);
    CHECK(nbl_log_set(callback, &user_data, 6) == NBL_ERR_INVALID_ARGUMENT);
    client_in_callback = open_client(url);
    lock_in_callback = open_lock(client_in_callback, "logged", NULL);
    CHECK(nbl_log_set(callback, &user_data, NBL_LOG_TRACE) == NBL_OK);
    nbl_lock_t *held = open_lock(client_in_callback, "logged", NULL);
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    ANSWERS(NBL_OK, nbl_lock_free(held)); /* abandoned, which is logged */
    while (!atomic_load(&inside))
        sched_yield();
    /* The callback runs: others go on, and unsetting it waits. */
    nbl_ping_t ping = NBL_PING_INIT;
    ANSWERS(NBL_OK, nbl_client_ping(client_in_callback, &ping, &err));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, unsets, NULL) == 0);
    CHECK(!atomic_load(&unset));
    atomic_store(&leave, true);
    CHECK(pthread_join(thread, NULL) == 0);
    int before = atomic_load(&lines);
    nbl_client_t *another = open_client(url);
    ANSWERS(NBL_OK, nbl_client_free(another));
    CHECK(atomic_load(&lines) == before);
    ANSWERS(NBL_OK, nbl_lock_free(lock_in_callback));
    ANSWERS(NBL_OK, nbl_client_free(client_in_callback));
}

static atomic_int highest_level;

static void notes_level(int32_t level, const char *line, void *user)
{
    (void)line, (void)user;
    if (level > atomic_load(&highest_level))
        atomic_store(&highest_level, level);
}

/* 0 as level is the default, NBL_LOG_INFO. */
static void default_log_level(const char *url)
{
    atomic_store(&highest_level, 0);
    CHECK(nbl_log_set(notes_level, NULL, 0) == NBL_OK);
    nbl_client_t *client = open_client(url);
    while (atomic_load(&highest_level) < NBL_LOG_INFO)
        sched_yield();
    CHECK(nbl_log_set(NULL, NULL, 0) == NBL_OK);
    CHECK(atomic_load(&highest_level) == NBL_LOG_INFO);
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* Signals go to the program's threads: those of the library, which exist by now, take none. */
static void threads_take_no_signals(void)
{
    DIR *threads = opendir("/proc/self/task");
    CHECK(threads != NULL);
    int of_the_library = 0;
    for (struct dirent *entry; (entry = readdir(threads)) != NULL;) {
        char path[300], line[200];
        unsigned long long blocked = 0;
        int ours = 0;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", entry->d_name);
        FILE *status = fopen(path, "r");
        while (status && fgets(line, sizeof line, status)) {
            ours |= strncmp(line, "Name:\tnblock", 12) == 0;
            sscanf(line, "SigBlk: %llx", &blocked);
        }
        if (status)
            fclose(status);
        if (!ours)
            continue;
        of_the_library++;
        static const int signals[] = {SIGHUP, SIGINT, SIGTERM, SIGCHLD, SIGUSR1, SIGALRM, SIGWINCH, SIGPIPE};
        for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
            CHECK(blocked >> (signals[i] - 1) & 1);
    }
    closedir(threads);
    CHECK(of_the_library >= 2);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    int rounds = atoi(argv[1]);
    static const char *const stores[] = {"memory:race", "embedded:"};
    for (int i = 0; i < 2; i++) {
        handles_come_and_go(stores[i], rounds);
        everybody_frees_it(stores[i], rounds / 4);
        freed_under_a_waiter(stores[i]);
        log_callback(stores[i]);
        default_log_level(stores[i]);
    }
    threads_take_no_signals();
    CHECK(atomic_load(&answers_of_the_living) > 0);
    printf("races: %u calls on living handles, %u on freed ones\n", atomic_load(&answers_of_the_living),
           atomic_load(&answers_of_the_dead));
    return 0;
}
