/*
 * A worker of the history test, in C: two threads, each of which locks, increments the number in the file
 * DIRECTORY/counter, notes in DIRECTORY/log what it did, and unlocks; until it is killed.
 *
 *     worker URL KEY DIRECTORY WHO SEED EXPIRE_MS
 *
 * What the notes mean says tests/proof/checker.rs.
 */
#define _GNU_SOURCE

#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <nblock.h>

static nbl_client_t *client;
static const char *key;
static uint64_t expire_ms;
static int counter, notes;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "worker.c: %s: %s\n", what, why);
    exit(1);
}

static void pause_ms(uint64_t ms)
{
    nanosleep(&(struct timespec){.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000}, NULL);
}

static uint64_t moment(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* A line in one write: lines of several processes do not mix. */
__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    char line[256] = "\n";
    va_list arguments;
    va_start(arguments, format);
    int length = 1 + vsnprintf(line + 1, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (write(notes, line, (size_t)length) != length)
        die("log", "cannot be written");
}

/* A missing answer is not ours to judge: it may be asked again. */
static int unanswered(nbl_status_t status)
{
    return status == NBL_ERR_UNREACHABLE || status == NBL_ERR_INDETERMINATE;
}

/* Counted from before it was asked for: never too late. 1 where it has passed. */
static uint64_t deadline_of(nbl_lock_t *lock)
{
    uint64_t now = moment(), remaining_ms = 0;
    const nbl_status_t status = nbl_lock_remaining_ms(lock, &remaining_ms, NULL);
    return status == NBL_OK && remaining_ms > 0 ? now + remaining_ms * 1000000 : 1;
}

/* Waits for the lock. Answers until when it is ours, or 0. */
static uint64_t acquire(nbl_lock_t *lock, const nbl_lock_options_t *options, uint64_t who, uint64_t turn)
{
    nbl_error_t err = {.struct_size = sizeof err};
    uint64_t fence = 0, deadline = 0, asked = moment();
    nbl_status_t status = nbl_lock(lock, options, &err);
    if (status == NBL_OK) {
        /* Asked for with the grant. */
        if (nbl_lock_fence(lock, &fence, &err) != NBL_OK)
            fence = 0;
        deadline = deadline_of(lock);
    } else if (unanswered(status) || status == NBL_LOST) {
        return 0;
    } else if (status != NBL_UNAVAILABLE) {
        die("nbl_lock", err.message);
    }
    uint64_t now = moment();
    if (status == NBL_OK && deadline <= now) {
        /* Over before it began: it is not relied on. */
        if (nbl_unlock(lock, NULL) != NBL_OK) {
            /* Nothing depends on it. */
        }
        return 0;
    }
    note("waited %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, asked,
         (uint64_t)options->timeout_ms * 1000000, now);
    if (status == NBL_OK)
        note("granted %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, fence, now, deadline);
    return deadline;
}

/* Reads the number, and writes it back one higher: two of these at once would lose one. */
static void increment(uint64_t who, uint64_t turn, uint64_t number, uint64_t deadline)
{
    uint64_t now = moment();
    if (now >= deadline)
        return;
    note("writing %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, number, now);
    char text[32];
    int length = snprintf(text, sizeof text, "%19" PRIu64 "\n", number + 1);
    if (pwrite(counter, text, (size_t)length, 0) != length)
        die("counter", "cannot be written");
    note("wrote %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, moment());
}

struct thread {
    pthread_t id;
    uint64_t who;
    unsigned seed;
};

static void *work(void *argument)
{
    struct thread *self = argument;
    uint64_t who = self->who;
    nbl_error_t err = {.struct_size = sizeof err};
    nbl_lock_t *lock;
    if (nbl_lock_new(client, key, NBL_CSTR, NULL, &lock, &err) != NBL_OK)
        die("nbl_lock_new", err.message);

    for (uint64_t turn = 1;; turn++) {
        static const int64_t timeouts_ms[] = {5, 200, 30000};
        nbl_lock_options_t options = {
            .struct_size = sizeof options,
            .expire_ms = (int64_t)expire_ms,
            .timeout_ms = timeouts_ms[rand_r(&self->seed) % 3],
            .auto_refresh = rand_r(&self->seed) % 4 == 0 ? NBL_ON : NBL_OFF,
            .fence = NBL_ON,
        };
        uint64_t deadline = acquire(lock, &options, who, turn);
        if (deadline == 0)
            continue;
        char text[32] = "";
        if (pread(counter, text, sizeof text - 1, 0) < 0)
            die("counter", "cannot be read");
        if (rand_r(&self->seed) % 100 == 0) {
            /* Long enough for its lease to run out now and then. */
            pause_ms(expire_ms * (uint64_t)(rand_r(&self->seed) % 170) / 100);
            uint64_t later = options.auto_refresh == NBL_ON ? deadline_of(lock) : 0;
            if (later > deadline) {
                deadline = later;
                note("renewed %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, deadline);
            }
        }
        increment(who, turn, strtoull(text, NULL, 10), deadline);
        note("released %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, moment());
        nbl_status_t status = nbl_unlock(lock, &err);
        if (status == NBL_LOST)
            note("lost %" PRIu64 " %" PRIu64 " %" PRIu64 " .\n", who, turn, moment());
        else if (status != NBL_OK && !unanswered(status))
            die("nbl_unlock", err.message);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 7)
        die("usage", "worker URL KEY DIRECTORY WHO SEED EXPIRE_MS");
    key = argv[2];
    expire_ms = strtoull(argv[6], NULL, 10);
    char path[4096];
    snprintf(path, sizeof path, "%s/counter", argv[3]);
    counter = open(path, O_RDWR);
    snprintf(path, sizeof path, "%s/log", argv[3]);
    notes = open(path, O_WRONLY | O_APPEND);
    if (counter < 0 || notes < 0)
        die(argv[3], "has no counter or no log");

    nbl_error_t err = {.struct_size = sizeof err};
    while (nbl_client_new(argv[1], NULL, &client, &err) != NBL_OK) {
        /* A connection that is cut while it is greeted reads like a wrong URL. */
        if (!unanswered(err.status) && err.status != NBL_ERR_STORE)
            die("nbl_client_new", err.message);
        pause_ms(20);
    }
    struct thread threads[2];
    for (unsigned i = 0; i < 2; i++) {
        threads[i].who = strtoull(argv[4], NULL, 10) + i;
        threads[i].seed = (unsigned)strtoul(argv[5], NULL, 10) * 2 + i;
        if (pthread_create(&threads[i].id, NULL, work, &threads[i]) != 0)
            die("pthread_create", "no thread");
    }
    pthread_join(threads[0].id, NULL);
    return 0;
}
