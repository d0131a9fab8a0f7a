/*
 * Runs the jobs of a directory. Start as many runners as you like; if they are on several machines that share the
 * directory, name one store for all of them in NBLOCK_URL.
 *
 *     job_runner DIRECTORY
 *
 * Every file *.job is a shell script. The process that gets a job's lock runs it and renames it to *.done;
 * the others take the next one. If a runner dies, another one can run its job when the lease has ended.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <nblock.h>

static int run(const char *path)
{
    char command[4096], done[4096];
    if (access(path, F_OK) != 0)
        return 0; /* another runner did it after we read the directory, and before we got the lock */
    snprintf(command, sizeof command, "sh '%s'", path);
    if (system(command) != 0) {
        fprintf(stderr, "%s failed: it will be tried again\n", path);
        return 0;
    }
    snprintf(done, sizeof done, "%.*s.done", (int)(strlen(path) - strlen(".job")), path);
    return rename(path, done) == 0;
}

/* Runs a job if no other runner does. Returns 1 if it was done, 0 if not, -1 after an error. */
static int run_alone(nbl_client_t *client, const char *name, const char *path)
{
    nbl_error_t err = NBL_ERROR_INIT;
    /* Renewed while the job runs, however long that is; at most 10 s after a crash, another runner gets the lock. */
    nbl_lock_options_t options = {.struct_size = sizeof options, .expire_ms = 10000, .auto_refresh = NBL_ON};
    nbl_lock_t *lock = NULL;
    char key[300];
    int done = -1;

    snprintf(key, sizeof key, "jobs:%s", name);
    if (nbl_lock_new(client, key, NBL_CSTR, &options, &lock, &err) != NBL_OK)
        goto failed;
    switch (nbl_try_lock(lock, NULL, &err)) {
    case NBL_UNAVAILABLE:
        nbl_lock_free(lock);
        return 0;
    case NBL_OK:
        break;
    default:
        goto failed;
    }
    done = run(path);
    switch (nbl_unlock(lock, &err)) {
    case NBL_OK:
        break;
    case NBL_LOST:
        fprintf(stderr, "%s: another runner may have run it at the same time\n", name);
        break;
    default:
        goto failed;
    }
    nbl_lock_free(lock);
    return done;

failed:
    fprintf(stderr, "%s: %s\n", name, err.message);
    nbl_lock_free(lock);
    return -1;
}

int main(int argc, char **argv)
{
    nbl_error_t err = NBL_ERROR_INIT;
    nbl_client_t *client = NULL;
    int count = 0, failed = 0;
    if (argc != 2) {
        fprintf(stderr, "usage: job_runner DIRECTORY\n");
        return 64;
    }
    DIR *directory = opendir(argv[1]);
    if (!directory) {
        perror(argv[1]);
        return 1;
    }
    if (nbl_client_new(NULL, NULL, &client, &err) != NBL_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    for (struct dirent *entry; (entry = readdir(directory)) != NULL;) {
        const char *ending = strrchr(entry->d_name, '.');
        char path[4096];
        if (!ending || strcmp(ending, ".job") != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", argv[1], entry->d_name);
        int done = run_alone(client, entry->d_name, path);
        count += done > 0;
        failed += done < 0;
    }
    closedir(directory);
    nbl_client_close(client, 0, NULL);
    nbl_client_free(client);
    printf("%d jobs done\n", count);
    return failed ? 1 : 0;
}
