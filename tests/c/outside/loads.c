/*
 * A program that loads the library when it runs, as plug-ins and other languages do: argument, its
 * name. It uses it, lets go of it while threads of the library run, and loads it again.
 */
#include <nblock.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void *symbol(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    return found;
}

#define LOAD(library, name) __typeof__(&name) p_##name = (__typeof__(&name))symbol(library, #name)

int main(int argc, char **argv)
{
    if (argc != 2)
        return 64;
    for (int round = 0; round < 20; round++) {
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (!library) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        LOAD(library, nbl_client_new);
        LOAD(library, nbl_client_free);
        LOAD(library, nbl_lock_new);
        LOAD(library, nbl_lock_free);
        LOAD(library, nbl_lock);
        LOAD(library, nbl_lock_start);
        LOAD(library, nbl_op_free);
        nbl_error_t err = {.struct_size = sizeof err};
        nbl_client_t *client = NULL;
        nbl_lock_t *lock = NULL, *second = NULL;
        nbl_op_t *op = NULL;
        /* Held and renewed, with a second one waiting: there is a thread at work when it is let go. */
        nbl_lock_options_t renewed = {.struct_size = sizeof renewed, .auto_refresh = NBL_ON, .expire_ms = 30};
        if (p_nbl_client_new("memory:", NULL, &client, &err) || p_nbl_lock_new(client, "k", 1, &renewed, &lock, &err) ||
            p_nbl_lock_new(client, "k", 1, NULL, &second, &err) || p_nbl_lock(lock, NULL, &err) ||
            p_nbl_lock_start(second, NULL, &op, &err)) {
            fprintf(stderr, "%s\n", err.message);
            return 1;
        }
        if (round % 2) {
            p_nbl_op_free(op);
            p_nbl_lock_free(lock);
            p_nbl_lock_free(second);
            p_nbl_client_free(client);
        }
        if (dlclose(library) != 0)
            return 1;
    }
    return 0;
}
