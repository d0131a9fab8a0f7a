/*
 * Every function with every kind of invalid handle, out-parameters where nothing can be written,
 * and error structs of every size: every answer must be an error in words, and a memory checker that
 * watches must see nothing. Argument: another copy of the library, for foreign handles.
 */
#include <dlfcn.h>

#include "calls.h"

/* Memory of exactly that size, so that a checker sees the first byte beyond it. */
static void *exactly(size_t size, const void *content, size_t content_size)
{
    unsigned char *memory = calloc(1, size);
    CHECK(memory != NULL);
    memcpy(memory, content, content_size < size ? content_size : size);
    return memory;
}

/* Every function, with an invalid handle. */
static void every_call_refuses(void *handle)
{
    for (unsigned which = handle ? 0 : 1; which < CLIENT_CALLS; which++)
        ANSWERS(NBL_ERR_BAD_HANDLE, client_call(which, handle));
    for (unsigned which = handle ? 0 : 1; which < LOCK_CALLS; which++)
        ANSWERS(NBL_ERR_BAD_HANDLE, lock_call(which, handle));
    for (unsigned which = handle ? 0 : 1; which < OP_CALLS; which++)
        ANSWERS(NBL_ERR_BAD_HANDLE, op_call(which, handle));
    for (unsigned which = handle ? 0 : 1; which < LIST_CALLS; which++)
        ANSWERS(NBL_ERR_BAD_HANDLE, list_call(which, handle));
}

static int a_function(void)
{
    return 0;
}

static void handles_that_are_none(void)
{
    int on_the_stack[64] = {0};
    void *on_the_heap = malloc(64);
    static const uintptr_t numbers[] = {
        1, 2, 3, 7, 8, 16, 0xffff, 1u << 31, (uintptr_t)1 << 63, UINTPTR_MAX - 1, UINTPTR_MAX,
    };

    every_call_refuses(NULL);
    CHECK(nbl_client_free(NULL) == NBL_OK && nbl_lock_free(NULL) == NBL_OK);
    CHECK(nbl_op_free(NULL) == NBL_OK && nbl_list_free(NULL) == NBL_OK);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        every_call_refuses((void *)numbers[i]);
    every_call_refuses(on_the_stack);
    every_call_refuses(on_the_heap);
    every_call_refuses((void *)(uintptr_t)a_function);
    free(on_the_heap);
    nbl_ping_t ping = NBL_PING_INIT;
    SAYS("client handle 0x0 is NULL", NBL_ERR_BAD_HANDLE, nbl_client_ping(NULL, &ping, &err));
}

static void handles_of_another_kind(nbl_client_t *client)
{
    nbl_lock_t *lock = open_lock(client, "kind", NULL);
    nbl_op_t *op = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_client_ping_start(client, &op, &err));
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    void *handles[] = {client, lock, op, list};
    for (int kind = 0; kind < 4; kind++) {
        void *handle = handles[kind];
        for (unsigned which = 0; which < CLIENT_CALLS && kind != 0; which++)
            ANSWERS(NBL_ERR_BAD_HANDLE, client_call(which, handle));
        for (unsigned which = 0; which < LOCK_CALLS && kind != 1; which++)
            ANSWERS(NBL_ERR_BAD_HANDLE, lock_call(which, handle));
        for (unsigned which = 0; which < OP_CALLS && kind != 2; which++)
            ANSWERS(NBL_ERR_BAD_HANDLE, op_call(which, handle));
        for (unsigned which = 0; which < LIST_CALLS && kind != 3; which++)
            ANSWERS(NBL_ERR_BAD_HANDLE, list_call(which, handle));
    }
    SAYS("is of another kind", NBL_ERR_BAD_HANDLE, nbl_unlock((nbl_lock_t *)client, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_list_free(list));
}

/* Freed, freed again, and used after another took its place. */
static void handles_that_were_freed(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "freed", NULL);
    nbl_op_t *op = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_client_ping_start(client, &op, &err));
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    void *handles[] = {client, lock, op, list};
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    ANSWERS(NBL_OK, nbl_client_free(client));
    for (int i = 0; i < 4; i++)
        every_call_refuses(handles[i]);
    SAYS("was freed", NBL_ERR_BAD_HANDLE, nbl_unlock(lock, &err));

    client = open_client(url);
    for (int round = 0; round < 1000; round++) {
        nbl_lock_t *next = open_lock(client, "freed", NULL);
        for (int i = 0; i < 4; i++)
            CHECK((void *)next != handles[i]);
        ANSWERS(NBL_ERR_BAD_HANDLE, nbl_try_lock(lock, NULL, &err));
        ANSWERS(NBL_OK, nbl_lock_free(next));
        lock = next;
    }
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* A handle that another copy of the library gave out. */
static void handles_of_another_copy(const char *path)
{
    void *copy = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!copy)
        check_failed(__FILE__, __LINE__, "the copy cannot be loaded", dlerror());
    nbl_status_t (*client_new)(const char *, const nbl_client_options_t *, nbl_client_t **, nbl_error_t *);
    nbl_status_t (*client_free)(nbl_client_t *);
    *(void **)&client_new = dlsym(copy, "nbl_client_new");
    *(void **)&client_free = dlsym(copy, "nbl_client_free");
    CHECK(client_new && client_free && client_new != nbl_client_new);

    nbl_client_t *foreign = NULL;
    ANSWERS(NBL_OK, client_new("memory:", NULL, &foreign, &err));
    every_call_refuses(foreign);
    nbl_client_t *ours = open_client("memory:");
    ANSWERS(NBL_ERR_BAD_HANDLE, client_free(ours));
    ANSWERS(NBL_OK, client_free(foreign));
    ANSWERS(NBL_OK, nbl_client_free(ours));
    CHECK(dlclose(copy) == 0);
}

static void out_parameters(nbl_client_t *client)
{
    nbl_lock_t *lock = open_lock(client, "out", NULL);
    nbl_list_t *list = NULL;
    nbl_op_t *op = NULL;
    ANSWERS(NBL_OK, nbl_try_lock(lock, NULL, &err));
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    ANSWERS(NBL_OK, nbl_client_ping_start(client, &op, &err));

    /* NULL, and one that no pointer or number could lie at. */
    _Alignas(16) unsigned char room[32] = {0};
    void *places[] = {NULL, room + 1, room + 2, room + 7};
    for (int i = 0; i < 4; i++) {
        void *out = places[i];
        const nbl_status_t wrong = NBL_ERR_INVALID_ARGUMENT;
        ANSWERS(wrong, nbl_client_new("memory:", NULL, out, &err));
        ANSWERS(wrong, nbl_client_new_start("memory:", NULL, out, &err));
        ANSWERS(wrong, nbl_client_ping(client, out, &err));
        ANSWERS(wrong, nbl_client_ping_start(client, out, &err));
        ANSWERS(wrong, nbl_lock_new(client, "out", NBL_CSTR, NULL, out, &err));
        ANSWERS(wrong, nbl_reentrant_lock_new(client, "out", NBL_CSTR, NULL, NULL, out, &err));
        ANSWERS(wrong, nbl_lock_start(lock, NULL, out, &err));
        ANSWERS(wrong, nbl_unlock_start(lock, out, &err));
        ANSWERS(wrong, nbl_refresh_start(lock, NULL, out, &err));
        if ((uintptr_t)out % sizeof(nbl_lock_state_t) != 0 || !out)
            ANSWERS(wrong, nbl_lock_state(lock, out, &err));
        ANSWERS(wrong, nbl_lock_remaining_ms(lock, out, &err));
        ANSWERS(wrong, nbl_lock_expires_at_ms(lock, out, &err));
        ANSWERS(wrong, nbl_lock_fence(lock, out, &err));
        ANSWERS(wrong, nbl_lock_fence_start(lock, out, &err));
        ANSWERS(wrong, nbl_op_take_client(op, out, &err));
        ANSWERS(wrong, nbl_op_take_list(op, out, &err));
        ANSWERS(wrong, nbl_op_take_fence(op, out, &err));
        ANSWERS(wrong, nbl_op_take_ping(op, out, &err));
        ANSWERS(wrong, nbl_list(client, NULL, out, &err));
        ANSWERS(wrong, nbl_list_start(client, NULL, out, &err));
        ANSWERS(wrong, nbl_find(client, "out", NBL_CSTR, out, &err));
        ANSWERS(wrong, nbl_find_start(client, "out", NBL_CSTR, out, &err));
        ANSWERS(wrong, nbl_list_length(list, out, &err));
        ANSWERS(wrong, nbl_list_record(list, 0, out, &err));
        ANSWERS(wrong, nbl_break_start(list, 0, out, &err));
        if (out) {
            ANSWERS(wrong, nbl_client_location(client, NULL, 0, out, &err));
            ANSWERS(wrong, nbl_lock_text(lock, NBL_TEXT_KEY, NULL, 0, out, &err));
        }
    }
    for (size_t i = 0; i < sizeof room; i++)
        CHECK(room[i] == 0);
    /* Nothing was done on the way. */
    IS_IN_STATE(NBL_STATE_HELD, lock);
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
}

/* Error structs of every size, at every place: never a byte too many. */
static void error_structs(nbl_client_t *client)
{
    static const uint32_t too_small[] = {0, 1, 4, 7, 8};
    for (size_t i = 0; i < sizeof too_small / sizeof *too_small; i++) {
        nbl_error_t *small = exactly(sizeof(uint32_t) + too_small[i], &too_small[i], sizeof(uint32_t));
        CHECK(nbl_unlock((nbl_lock_t *)client, small) == NBL_ERR_INVALID_ARGUMENT);
        free(small);
    }
    for (uint32_t size = offsetof(nbl_error_t, message) + 1; size < 2 * sizeof(nbl_error_t); size++) {
        nbl_error_t *sized = exactly(size, &size, sizeof size);
        CHECK(nbl_unlock((nbl_lock_t *)client, sized) == NBL_ERR_BAD_HANDLE);
        CHECK(sized->struct_size == size && sized->status == NBL_ERR_BAD_HANDLE);
        size_t room = size - offsetof(nbl_error_t, message);
        CHECK(strnlen(sized->message, room) < room && strnlen(sized->message, room) < NBL_ERROR_MESSAGE_SIZE);
        free(sized);
    }
    unsigned char *room = exactly(sizeof(nbl_error_t) + 1, "", 0);
    uint32_t size = sizeof(nbl_error_t), status;
    memcpy(room + 1, &size, sizeof size);
    CHECK(nbl_unlock((nbl_lock_t *)client, (nbl_error_t *)(void *)(room + 1)) == NBL_ERR_BAD_HANDLE);
    memcpy(&status, room + 5, sizeof status);
    CHECK((nbl_status_t)status == NBL_ERR_BAD_HANDLE && room[9] != 0);
    free(room);
    CHECK(nbl_unlock((nbl_lock_t *)client, NULL) == NBL_ERR_BAD_HANDLE);
}

static void numbers(void)
{
    static const int32_t none[] = {INT32_MIN, -12, 6, INT32_MAX};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        CHECK(strcmp(nbl_status_name(none[i]), "NBL_UNKNOWN") == 0);
    for (int32_t status = NBL_ERR_BUFFER_TOO_SMALL; status <= NBL_CANCELLED; status++)
        CHECK(strcmp(nbl_status_name(status), "NBL_UNKNOWN") != 0);
    CHECK(nbl_abi_version() >= NBL_ABI_VERSION && nbl_version()[0] != '\0');
    CHECK(nbl_log_set(NULL, NULL, INT32_MIN) == NBL_OK);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    numbers();
    handles_that_are_none();
    static const char *const stores[] = {"memory:", "embedded:"};
    for (int i = 0; i < 2; i++) {
        nbl_client_t *client = open_client(stores[i]);
        handles_of_another_kind(client);
        handles_that_were_freed(stores[i]);
        out_parameters(client);
        error_structs(client);
        ANSWERS(NBL_OK, nbl_client_close(client, 0, &err));
        ANSWERS(NBL_OK, nbl_client_free(client));
    }
    handles_of_another_copy(argv[1]);
    return 0;
}
