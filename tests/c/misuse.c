/*
 * Does everything wrong that one thread can do: every answer must be an error in words, and a memory
 * checker that watches must see nothing. Argument: another copy of the library, for foreign handles.
 */
#include <dlfcn.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "calls.h"

/* Memory of exactly that size, so that a checker sees the first byte beyond it. */
static void *exactly(size_t size, const void *content, size_t content_size)
{
    unsigned char *memory = calloc(1, size);
    CHECK(memory != NULL);
    memcpy(memory, content, content_size < size ? content_size : size);
    return memory;
}

/* Every function, with a handle that is no good. */
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
    static const uintptr_t numbers[] = {1, 2, 3, 7, 8, 16, 0xffff, 1u << 31, UINTPTR_MAX, UINTPTR_MAX - 1, (uintptr_t)1 << 63};

    every_call_refuses(NULL);
    CHECK(nbl_client_free(NULL) == NBL_OK && nbl_lock_free(NULL) == NBL_OK);
    CHECK(nbl_op_free(NULL) == NBL_OK && nbl_list_free(NULL) == NBL_OK);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        every_call_refuses((void *)numbers[i]);
    every_call_refuses(on_the_stack);
    every_call_refuses(on_the_heap);
    every_call_refuses((void *)(uintptr_t)a_function);
    free(on_the_heap);
    SAYS("client handle 0x0 is NULL", NBL_ERR_BAD_HANDLE, nbl_ping(NULL, &err));
}

static void handles_of_another_kind(nbl_client_t *client)
{
    nbl_lock_t *lock = open_lock(client, "kind", NULL);
    nbl_op_t *op = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_ping_start(client, &op, &err));
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
    ANSWERS(NBL_OK, nbl_ping_start(client, &op, &err));
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
    ANSWERS(NBL_OK, nbl_ping_start(client, &op, &err));

    /* NULL, and one that no pointer or number could lie at. */
    _Alignas(16) unsigned char room[32] = {0};
    void *places[] = {NULL, room + 1, room + 2, room + 7};
    for (int i = 0; i < 4; i++) {
        void *out = places[i];
        const nbl_status_t wrong = NBL_ERR_INVALID_ARGUMENT;
        ANSWERS(wrong, nbl_client_new("memory:", NULL, out, &err));
        ANSWERS(wrong, nbl_client_start("memory:", NULL, out, &err));
        ANSWERS(wrong, nbl_ping_start(client, out, &err));
        ANSWERS(wrong, nbl_lock_new(client, "out", NBL_CSTR, NULL, out, &err));
        ANSWERS(wrong, nbl_reentrant_lock_new(client, "out", NBL_CSTR, NULL, NULL, out, &err));
        ANSWERS(wrong, nbl_lock_start(lock, NULL, out, &err));
        ANSWERS(wrong, nbl_unlock_start(lock, out, &err));
        ANSWERS(wrong, nbl_refresh_start(lock, NULL, out, &err));
        ANSWERS(wrong, nbl_lock_remaining_ms(lock, out, &err));
        ANSWERS(wrong, nbl_lock_expires_at_ms(lock, out, &err));
        ANSWERS(wrong, nbl_lock_fence(lock, out, &err));
        ANSWERS(wrong, nbl_fence_start(lock, out, &err));
        ANSWERS(wrong, nbl_op_take_client(op, out, &err));
        ANSWERS(wrong, nbl_op_take_list(op, out, &err));
        ANSWERS(wrong, nbl_op_fence(op, out, &err));
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
            ANSWERS(wrong, nbl_list_text(list, 0, NBL_TEXT_KEY, NULL, 0, out, &err));
        }
    }
    for (size_t i = 0; i < sizeof room; i++)
        CHECK(room[i] == 0);
    /* Nothing was done on the way. */
    ANSWERS(NBL_OK, nbl_lock_state(lock));
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

static void option_values(nbl_client_t *client)
{
    const nbl_status_t wrong = NBL_ERR_INVALID_ARGUMENT;
    static const int64_t wrong_lengths[] = {INT64_MIN, -1, 31622400001, INT64_MAX};
    static const int64_t wrong_timeouts[] = {INT64_MIN, -3};
    static const int32_t wrong_switches[] = {INT32_MIN, -2, 2, INT32_MAX};
    nbl_lock_t *lock = open_lock(client, "options", NULL);
    nbl_lock_t *none = NULL;
    nbl_list_t *list = NULL;
    nbl_client_t *no_client = NULL;

#define LOCK_OPTIONS_ARE_WRONG(text, ...)                                              \
    do {                                                                               \
        nbl_lock_options_t options = {.struct_size = sizeof options, __VA_ARGS__};     \
        SAYS(text, wrong, nbl_try_lock(lock, &options, &err));                         \
        SAYS(text, wrong, nbl_lock(lock, &options, &err));                             \
        SAYS(text, wrong, nbl_refresh(lock, &options, &err));                          \
        SAYS(text, wrong, nbl_lock_new(client, "k", 1, &options, &none, &err));        \
        SAYS(text, wrong, nbl_reentrant_lock_new(client, "k", 1, NULL, &options, &none, &err)); \
        SAYS(text, wrong, nbl_lock_start(lock, &options, (nbl_op_t **)&none, &err));   \
        SAYS(text, wrong, nbl_refresh_start(lock, &options, (nbl_op_t **)&none, &err)); \
    } while (0)
#define CLIENT_OPTIONS_ARE_WRONG(text, ...)                                            \
    do {                                                                               \
        nbl_client_options_t options = {.struct_size = sizeof options, __VA_ARGS__};   \
        SAYS(text, wrong, nbl_client_new("memory:", &options, &no_client, &err));      \
        SAYS(text, wrong, nbl_client_start("memory:", &options, (nbl_op_t **)&none, &err)); \
    } while (0)

    for (int i = 0; i < 4; i++) {
        LOCK_OPTIONS_ARE_WRONG("expire", .expire_ms = wrong_lengths[i]);
        LOCK_OPTIONS_ARE_WRONG("auto_refresh", .auto_refresh = wrong_switches[i]);
        LOCK_OPTIONS_ARE_WRONG("fence", .fence = wrong_switches[i]);
        CLIENT_OPTIONS_ARE_WRONG("expire", .expire_ms = wrong_lengths[i]);
        CLIENT_OPTIONS_ARE_WRONG("op_timeout", .op_timeout_ms = wrong_lengths[i]);
        CLIENT_OPTIONS_ARE_WRONG("connect_timeout", .connect_timeout_ms = wrong_lengths[i]);
    }
    for (int i = 0; i < 2; i++) {
        LOCK_OPTIONS_ARE_WRONG("timeout_ms", .timeout_ms = wrong_timeouts[i]);
        CLIENT_OPTIONS_ARE_WRONG("timeout_ms", .timeout_ms = wrong_timeouts[i]);
        ANSWERS(wrong, nbl_client_close(client, wrong_timeouts[i], &err));
    }
    LOCK_OPTIONS_ARE_WRONG("if_held is 3", .if_held = 3);
    LOCK_OPTIONS_ARE_WRONG("if_held is -1", .if_held = -1);
    CLIENT_OPTIONS_ARE_WRONG("reserved is 1", .reserved = 1);
    CLIENT_OPTIONS_ARE_WRONG("not UTF-8", .app = "\xff");
    char *long_app = malloc(257);
    memset(long_app, 'a', 256);
    long_app[256] = '\0';
    CLIENT_OPTIONS_ARE_WRONG("app has 256 bytes", .app = long_app);
    ANSWERS(NBL_OK, nbl_client_new("memory:", &(nbl_client_options_t){.struct_size = sizeof(nbl_client_options_t), .app = long_app + 1}, &no_client, &err));
    ANSWERS(NBL_OK, nbl_client_free(no_client));
    free(long_app);
    for (int i = 0; i < 4; i++)
        SAYS("filter is", wrong, nbl_list(client, &(nbl_list_options_t){sizeof(nbl_list_options_t), i == 2 ? 3 : wrong_switches[i]}, &list, &err));

    /* The client still is open: a close with a wrong timeout closed nothing. */
    ANSWERS(NBL_OK, nbl_ping(client, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_state(lock));
    /* Times beyond all clocks are long, not wrong. */
    nbl_op_t *op = NULL;
    ANSWERS(NBL_OK, nbl_try_lock(lock, &(nbl_lock_options_t){.struct_size = sizeof(nbl_lock_options_t), .timeout_ms = INT64_MAX, .expire_ms = 31622400000}, &err));
    ANSWERS(NBL_OK, nbl_ping_start(client, &op, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, INT64_MAX, &err));
    ANSWERS(wrong, nbl_op_wait(op, -3, &err));
    ANSWERS(wrong, nbl_op_wait(op, INT64_MIN, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    CHECK(none == NULL && list == NULL);
}

static void keys_and_other_text(nbl_client_t *client)
{
    const nbl_status_t wrong = NBL_ERR_INVALID_ARGUMENT;
    nbl_lock_t *lock = NULL;
    nbl_list_t *list = NULL;
    static const struct { const char *bytes; size_t length; const char *words; } keys[] = {
        {NULL, NBL_CSTR, "key is NULL"},
        {NULL, 0, "key is NULL"},
        {NULL, 5, "key is NULL"},
        {"", NBL_CSTR, "key is empty"},
        {"x", 0, "key is empty"},
        {"x", SIZE_MAX - 1, "key has 18446744073709551614 bytes"},
        {"x", SIZE_MAX / 2 + 1, "key has 9223372036854775808 bytes"},
        {"x", SIZE_MAX / 2, "key has 9223372036854775807 bytes"},
        {"x", (size_t)1 << 40, "key has 1099511627776 bytes"},
        {"x", (1 << 20) + 1, "key has 1048577 bytes"},
        {"\xff", NBL_CSTR, "not UTF-8: the byte at offset 0"},
        {"ok\xc3", NBL_CSTR, "not UTF-8: the byte at offset 2"},        /* cut short */
        {"\xc0\xaf", NBL_CSTR, "not UTF-8"},                            /* overlong */
        {"\xed\xa0\x80", NBL_CSTR, "not UTF-8"},                        /* a surrogate */
        {"\xf4\x90\x80\x80", NBL_CSTR, "not UTF-8"},                    /* beyond U+10FFFF */
        {"a\0\x80", 3, "not UTF-8: the byte at offset 2"},
    };
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        ANSWERS(wrong, nbl_lock_new(client, keys[i].bytes, keys[i].length, NULL, &lock, &err));
        CHECK(strstr(err.message, keys[i].words));
        ANSWERS(wrong, nbl_reentrant_lock_new(client, keys[i].bytes, keys[i].length, NULL, NULL, &lock, &err));
        ANSWERS(wrong, nbl_find(client, keys[i].bytes, keys[i].length, &list, &err));
        ANSWERS(wrong, nbl_find_start(client, keys[i].bytes, keys[i].length, (nbl_op_t **)&list, &err));
        CHECK(lock == NULL && list == NULL);
    }

    /* The longest key there is; one with a NUL in it; one that ends where its memory ends. */
    size_t longest = 1 << 20, needed = 0;
    char *key = malloc(longest);
    memset(key, 'k', longest);
    key[1] = '\0';
    ANSWERS(NBL_OK, nbl_lock_new(client, key, longest, NULL, &lock, &err));
    ANSWERS(NBL_OK, nbl_try_lock(lock, NULL, &err));
    SAYS("already locked", NBL_ERR_INVALID_OP, nbl_try_lock(lock, NULL, &err));
    ANSWERS(NBL_OK, nbl_find(client, key, longest, &list, &err));
    ANSWERS(NBL_OK, nbl_list_text(list, 0, NBL_TEXT_KEY, NULL, 0, &needed, &err));
    CHECK(needed == longest + 1);
    char *copy = malloc(needed);
    SAYS("the text needs 1048577", wrong, nbl_list_text(list, 0, NBL_TEXT_KEY, copy, needed - 1, &needed, &err));
    SAYS("the buffer has 0 bytes", wrong, nbl_list_text(list, 0, NBL_TEXT_KEY, copy, 0, NULL, &err));
    ANSWERS(wrong, nbl_list_text(list, 0, NBL_TEXT_KEY, NULL, needed, &needed, &err));
    ANSWERS(NBL_OK, nbl_list_text(list, 0, NBL_TEXT_KEY, copy, needed, NULL, &err));
    CHECK(memcmp(copy, key, longest) == 0 && copy[longest] == '\0');
    ANSWERS(NBL_OK, nbl_lock_text(lock, NBL_TEXT_KEY, copy, SIZE_MAX, NULL, &err));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    free(copy);
    free(key);

    static const int32_t no_fields[] = {INT32_MIN, -1, 0, 8, INT32_MAX, NBL_TEXT_HOST};
    lock = open_lock(client, "text", NULL);
    for (size_t i = 0; i < sizeof no_fields / sizeof *no_fields; i++)
        SAYS("field is", wrong, nbl_lock_text(lock, no_fields[i], NULL, 0, &needed, &err));
    SAYS("no owner token", wrong, nbl_lock_text(lock, NBL_TEXT_OWNER_TOKEN, NULL, 0, &needed, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_text(lock, NBL_TEXT_INSTANCE_TOKEN, NULL, 0, &needed, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));

    char owner[257];
    memset(owner, 'o', 256);
    owner[256] = '\0';
    SAYS("owner token has 256", wrong, nbl_reentrant_lock_new(client, "k", 1, owner, NULL, &lock, &err));
    SAYS("owner token is empty", wrong, nbl_reentrant_lock_new(client, "k", 1, "", NULL, &lock, &err));
    SAYS("not UTF-8", wrong, nbl_reentrant_lock_new(client, "k", 1, "\x80", NULL, &lock, &err));
    ANSWERS(NBL_OK, nbl_reentrant_lock_new(client, "k", 1, owner + 1, NULL, &lock, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
}

static void urls(void)
{
    nbl_client_t *client = NULL;
    nbl_op_t *op = NULL;
    static const char *const wrong[] = {
        "", ":", "memory", "no such store", "http://localhost/", "embedded:relative/path", "rethinkdb://",
        "rethinkdb://user:secret@host:0/db", "rethinkdb://user:secret@host:99999/db", "rethinkdb://user:secret@[::1/db",
        "rethinkdb://user:secret@host/db?no-such-option=secret", "rethinkdb://user:secret%zz@host/db", "\xff\xfe",
        "memory:\xed\xa0\x80", "\n", "embedded:/tmp?group", "embedded:?x=y",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        nbl_status_t status = nbl_client_new(wrong[i], NULL, &client, &err);
        if (status != NBL_ERR_INVALID_ARGUMENT) {
            fprintf(stderr, "the URL %s was answered %s: %s\n", wrong[i], nbl_status_name(status), err.message);
            abort();
        }
        CHECK(!strstr(err.message, "secret") && client == NULL);
        status = nbl_client_start(wrong[i], NULL, &op, &err);
        if (status == NBL_OK) {
            ANSWERS(NBL_ERR_INVALID_ARGUMENT, nbl_op_wait(op, NBL_FOREVER, &err));
            ANSWERS(NBL_OK, nbl_op_free(op));
        } else {
            CHECK(status == NBL_ERR_INVALID_ARGUMENT);
        }
    }
    size_t size = 1 << 20;
    char *url = malloc(size + 1);
    memset(url, 'x', size);
    url[size] = '\0';
    memcpy(url, "embedded:/", 10);
    CHECK(nbl_client_new(url, NULL, &client, &err) < 0);
    memcpy(url, "rethinkdb://", 12);
    CHECK(nbl_client_new(url, NULL, &client, &err) < 0);
    free(url);
}

/* Calls that fit no state, and operations asked for what they have not. */
static void wrong_moments(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "moment", NULL);
    uint64_t number = 0;
    size_t needed = 0;
    ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(lock, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_refresh(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_remaining_ms(lock, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_expires_at_ms(lock, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_fence(lock, &number, &err));
    ANSWERS(NBL_OK, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_try_lock(lock, NULL, &err));

    /* An acquire that must wait: what it has not yet, what it never has, and its end by a cancel. */
    nbl_lock_t *other = open_lock(client, "moment", NULL);
    nbl_op_t *op = NULL, *second = NULL;
    nbl_client_t *no_client = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_PENDING, nbl_op_finish(op, &err));
    ANSWERS(NBL_PENDING, nbl_op_wait(op, NBL_NO_WAIT, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_client(op, &no_client, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_list(op, &list, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_fence(op, &number, &err));
    ANSWERS(NBL_PENDING, nbl_lock_state(other));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(other, &err));
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &second, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_wait(second, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_op_free(second));
    CHECK(nbl_op_fd(op) >= 0 && nbl_op_fd(op) == nbl_op_fd(op));
    ANSWERS(NBL_OK, nbl_op_cancel(op));
    ANSWERS(NBL_OK, nbl_op_cancel(op));
    ANSWERS(NBL_CANCELLED, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_CANCELLED, nbl_op_take_list(op, &list, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_state(other));
    ANSWERS(NBL_OK, nbl_op_free(op));

    /* The lock is freed under an acquire, which gives back what it gets; then the client under another. */
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    ANSWERS(NBL_ERR_BAD_HANDLE, nbl_lock_state(other));
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    CHECK(nbl_op_wait(op, NBL_FOREVER, &err) != NBL_OK);
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock(lock, NULL, &err));

    ANSWERS(NBL_OK, nbl_list_start(client, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_fence(op, &number, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_client(op, &no_client, &err));
    ANSWERS(NBL_OK, nbl_op_take_list(op, &list, &err));
    nbl_list_t *again = NULL;
    ANSWERS(NBL_ERR_INVALID_OP, nbl_op_take_list(op, &again, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    SAYS("index is 18446744073709551615", NBL_ERR_INVALID_ARGUMENT, nbl_break(list, SIZE_MAX, &err));
    ANSWERS(NBL_ERR_INVALID_ARGUMENT, nbl_list_text(list, SIZE_MAX, NBL_TEXT_KEY, NULL, 0, &needed, &err));
    nbl_record_t record = {.struct_size = sizeof record};
    ANSWERS(NBL_ERR_INVALID_ARGUMENT, nbl_list_record(list, SIZE_MAX / 2, &record, &err));

    other = open_lock(client, "moment", NULL);
    ANSWERS(NBL_OK, nbl_lock_start(other, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
    ANSWERS(NBL_CANCELLED, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    /* Locks and lists outlive their client, and say so. */
    SAYS("client is closed", NBL_ERR_INVALID_OP, nbl_try_lock(other, NULL, &err));
    SAYS("client is closed", NBL_ERR_INVALID_OP, nbl_break(list, 0, &err));
    ANSWERS(NBL_OK, nbl_list_record(list, 0, &record, &err));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_lock_free(other));
    ANSWERS(NBL_OK, nbl_lock_free(lock));

    client = open_client("memory:");
    lock = open_lock(client, "moment", NULL);
    ANSWERS(NBL_OK, nbl_client_close(client, INT64_MAX, &err));
    ANSWERS(NBL_OK, nbl_client_close(client, NBL_FOREVER, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_ping(client, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock(lock, NULL, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_new(client, "k", 1, NULL, &other, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
}

/* In a forked child: every handle of the parent's may be used and freed, and nothing of it is disturbed. */
static void in_a_child(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *held = open_lock(client, "forked", NULL), *waiting = open_lock(client, "forked", NULL);
    nbl_op_t *op = NULL;
    nbl_list_t *list = NULL;
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    ANSWERS(NBL_OK, nbl_lock_start(waiting, NULL, &op, &err));
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        ANSWERS(NBL_ERR_FORKED, nbl_op_finish(op, &err));
        ANSWERS(NBL_ERR_FORKED, nbl_op_wait(op, NBL_FOREVER, &err));
        ANSWERS(NBL_ERR_FORKED, nbl_op_cancel(op));
        CHECK(nbl_op_fd(op) == -1);
        ANSWERS(NBL_OK, nbl_op_free(op));
        ANSWERS(NBL_ERR_FORKED, nbl_lock_state(held));
        ANSWERS(NBL_ERR_FORKED, nbl_unlock(held, &err));
        ANSWERS(NBL_ERR_INVALID_OP, nbl_unlock(held, &err));
        ANSWERS(NBL_OK, nbl_lock_free(held));
        ANSWERS(NBL_OK, nbl_lock_free(waiting));
        ANSWERS(NBL_OK, nbl_list_free(list));
        ANSWERS(NBL_OK, nbl_client_free(client));
        ANSWERS(NBL_ERR_BAD_HANDLE, nbl_client_free(client));
        end_child();
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    ANSWERS(NBL_PENDING, nbl_op_finish(op, &err));
    ANSWERS(NBL_OK, nbl_unlock(held, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, NBL_FOREVER, &err));
    ANSWERS(NBL_OK, nbl_unlock(waiting, &err));
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_lock_free(waiting));
    ANSWERS(NBL_OK, nbl_lock_free(held));
    ANSWERS(NBL_OK, nbl_client_close(client, 0, &err));
    ANSWERS(NBL_OK, nbl_client_free(client));
}

/* No descriptor is left: what needs one says so, the rest goes on. */
static void without_descriptors(const char *url)
{
    nbl_client_t *client = open_client(url);
    nbl_lock_t *lock = open_lock(client, "descriptors", NULL);
    nbl_op_t *op = NULL;
    struct rlimit before, none;
    ANSWERS(NBL_OK, nbl_ping_start(client, &op, &err));
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none = before;
    none.rlim_cur = 0;
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK(nbl_op_fd(op) == -1 && nbl_lock_lost_fd(lock) == -1);
    ANSWERS(NBL_OK, nbl_try_lock(lock, NULL, &err));
    CHECK(nbl_lock_lost_fd(lock) == -1);
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK(nbl_op_fd(op) >= 0 && nbl_lock_lost_fd(lock) >= 0);
    ANSWERS(NBL_OK, nbl_op_free(op));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    ANSWERS(NBL_OK, nbl_client_free(client));
}

static void numbers(void)
{
    static const int32_t none[] = {INT32_MIN, -11, 7, INT32_MAX};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++)
        CHECK(strcmp(nbl_status_name(none[i]), "NBL_UNKNOWN") == 0);
    for (int32_t status = NBL_ERR_RESOURCES; status <= NBL_OVERDUE; status++)
        CHECK(strcmp(nbl_status_name(status), "NBL_UNKNOWN") != 0);
    CHECK(nbl_abi_version() >= NBL_ABI_VERSION && nbl_version()[0] != '\0');
    CHECK(nbl_set_log(NULL, NULL, INT32_MIN) == NBL_OK);
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
        option_values(client);
        keys_and_other_text(client);
        wrong_moments(stores[i]);
        in_a_child(stores[i]);
        without_descriptors(stores[i]);
        ANSWERS(NBL_OK, nbl_client_close(client, 0, &err));
        ANSWERS(NBL_OK, nbl_client_free(client));
    }
    urls();
    handles_of_another_copy(argv[1]);
    return 0;
}
