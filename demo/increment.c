/*
 * Increments a number in a plain file, again and again, under the lock jobs:demo.
 *
 *     increment NAME COUNT COUNTER LOG
 *
 * The file is read, and written back one higher, with nothing to protect it but the lock. Every
 * increment is noted in LOG as "NUMBER NAME FENCE".
 */
#define _POSIX_C_SOURCE 200809L

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <nblock.h>

static void die(const char *what, const nbl_error_t *err)
{
    fprintf(stderr, "increment: %s: %s\n", what, err->message);
    exit(1);
}

/* Reads the number, and writes it back one higher: two of these at once would lose one. */
static long increment(const char *path)
{
    char text[32] = "";
    int file = open(path, O_RDWR);
    if (file < 0 || pread(file, text, sizeof text - 1, 0) < 0) {
        perror(path);
        exit(1);
    }
    long number = strtol(text, NULL, 10) + 1;
    int length = snprintf(text, sizeof text, "%019ld\n", number);
    if (pwrite(file, text, (size_t)length, 0) != length || close(file) != 0) {
        perror(path);
        exit(1);
    }
    return number;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fprintf(stderr, "usage: increment NAME COUNT COUNTER LOG\n");
        return 64;
    }
    const char *name = argv[1];
    long count = strtol(argv[2], NULL, 10);
    int log = open(argv[4], O_WRONLY | O_APPEND);
    if (log < 0) {
        perror(argv[4]);
        return 1;
    }

    nbl_error_t err = NBL_ERROR_INIT;
    nbl_client_t *client;
    nbl_lock_t *lock;
    /* A short lease: when one of us is killed, the others wait no longer than that. */
    nbl_lock_options_t options = {.struct_size = sizeof options, .expire_ms = 1000, .timeout_ms = 60000};
    if (nbl_client_new(NULL, NULL, &client, &err) != NBL_OK)
        die("nbl_client_new", &err);
    if (nbl_lock_new(client, "jobs:demo", NBL_CSTR, &options, &lock, &err) != NBL_OK)
        die("nbl_lock_new", &err);

    for (long done = 0; done < count; done++) {
        uint64_t fence;
        if (nbl_lock(lock, NULL, &err) != NBL_OK)
            die("nbl_lock", &err);
        if (nbl_lock_fence(lock, &fence, &err) != NBL_OK)
            die("nbl_lock_fence", &err);
        long number = increment(argv[3]);
        char line[128];
        int length = snprintf(line, sizeof line, "%ld %s %llu\n", number, name, (unsigned long long)fence);
        if (write(log, line, (size_t)length) != length) {
            perror(argv[4]);
            return 1;
        }
        if (nbl_unlock(lock, &err) != NBL_OK)
            die("nbl_unlock", &err);
        /* What else there is to do, without the lock. */
        nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
    }
    nbl_lock_free(lock);
    nbl_client_close(client, 0, &err);
    nbl_client_free(client);
    return 0;
}
