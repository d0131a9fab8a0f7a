/*
 * Options, keys, URLs and other text that are wrong in every way: each is refused with the value and the
 * rule, before anything is done, and no password is in a message.
 */
#include "check.h"

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
        SAYS(text, wrong, nbl_client_new_start("memory:", &options, (nbl_op_t **)&none, &err)); \
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
        SAYS("timeout_ms must be", wrong, nbl_client_close(client, wrong_timeouts[i], &err));
    }
    LOCK_OPTIONS_ARE_WRONG("if_held must be NBL_IF_HELD_ERROR, NBL_IF_HELD_WAIT, or 0 for the default (got 3)",
                           .if_held = 3);
    LOCK_OPTIONS_ARE_WRONG("(got -1)", .if_held = -1);
    CLIENT_OPTIONS_ARE_WRONG("reserved must be 0 (got 1)", .reserved = 1);
    CLIENT_OPTIONS_ARE_WRONG("must be UTF-8", .app = "\xff");
    char *long_app = malloc(257);
    memset(long_app, 'a', 256);
    long_app[256] = '\0';
    CLIENT_OPTIONS_ARE_WRONG("app must have at most 255 bytes (got 256)", .app = long_app);
    nbl_client_options_t longest_app = {.struct_size = sizeof longest_app, .app = long_app + 1};
    ANSWERS(NBL_OK, nbl_client_new("memory:", &longest_app, &no_client, &err));
    ANSWERS(NBL_OK, nbl_client_free(no_client));
    free(long_app);
    static const int32_t wrong_filters[] = {INT32_MIN, -1, 3, INT32_MAX};
    for (int i = 0; i < 4; i++) {
        nbl_list_options_t options = {.struct_size = sizeof options, .filter = wrong_filters[i]};
        SAYS("filter must be", wrong, nbl_list(client, &options, &list, &err));
    }

    /* The client still is open: a close with a wrong timeout closed nothing. */
    nbl_ping_t ping = NBL_PING_INIT, taken = NBL_PING_INIT;
    char location[512];
    ANSWERS(NBL_OK, nbl_client_ping(client, &ping, &err));
    ANSWERS(NBL_OK, nbl_client_location(client, location, sizeof location, NULL, &err));
    CHECK(ping.server[0] && strcmp(ping.location, location) == 0);
    CHECK(ping.skew_measured == 0 && ping.skew_ms == 0 && ping.round_trip_us < 60000000);
    IS_IN_STATE(NBL_STATE_IDLE, lock);
    /* Times beyond all clocks are long, not wrong. */
    nbl_op_t *op = NULL;
    nbl_lock_options_t longest = {.struct_size = sizeof longest, .timeout_ms = INT64_MAX, .expire_ms = 31622400000};
    ANSWERS(NBL_OK, nbl_lock(lock, &longest, &err));
    ANSWERS(NBL_OK, nbl_client_ping_start(client, &op, &err));
    ANSWERS(NBL_OK, nbl_op_wait(op, INT64_MAX, &err));
    /* 0 is the default, which is forever: the operation has ended. */
    ANSWERS(NBL_OK, nbl_op_wait(op, 0, &err));
    for (int i = 0; i < 2; i++) {
        ANSWERS(NBL_OK, nbl_op_take_ping(op, &taken, &err));
        CHECK(strcmp(taken.server, ping.server) == 0 && strcmp(taken.location, location) == 0);
    }
    taken.struct_size = 0;
    SAYS("struct_size must be sizeof(nbl_ping_t)", wrong, nbl_op_take_ping(op, &taken, &err));
    SAYS("(got -3)", wrong, nbl_op_wait(op, -3, &err));
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
        {NULL, NBL_CSTR, "key must not be NULL"},
        {NULL, 0, "key must not be NULL"},
        {NULL, 5, "key must not be NULL"},
        {"", NBL_CSTR, "got an empty one"},
        {"x", 0, "got an empty one"},
        {"x", SIZE_MAX - 1, "(got 18446744073709551614"},
        {"x", SIZE_MAX / 2 + 1, "(got 9223372036854775808"},
        {"x", SIZE_MAX / 2, "(got 9223372036854775807"},
        {"x", (size_t)1 << 40, "(got 1099511627776"},
        {"x", (1 << 20) + 1, "(got 1048577"},
        {"\xff", NBL_CSTR, "invalid byte at offset 0"},
        {"ok\xc3", NBL_CSTR, "invalid byte at offset 2"},        /* cut short */
        {"\xc0\xaf", NBL_CSTR, "must be UTF-8"},                            /* overlong */
        {"\xed\xa0\x80", NBL_CSTR, "must be UTF-8"},                        /* a surrogate */
        {"\xf4\x90\x80\x80", NBL_CSTR, "must be UTF-8"},                    /* beyond U+10FFFF */
        {"a\0\x80", 3, "invalid byte at offset 2"},
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
    nbl_record_t record = NBL_RECORD_INIT;
    ANSWERS(NBL_OK, nbl_list_record(list, 0, &record, &err));
    CHECK(record.key_len == longest && memcmp(record.key, key, longest) == 0 && record.key[longest] == '\0');
    ANSWERS(NBL_OK, nbl_lock_text(lock, NBL_TEXT_KEY, NULL, 0, &needed, &err));
    CHECK(needed == longest + 1);
    char *copy = malloc(needed);
    const nbl_status_t too_small = NBL_ERR_BUFFER_TOO_SMALL;
    size_t reported = 0;
    SAYS("at least 1048577", too_small, nbl_lock_text(lock, NBL_TEXT_KEY, copy, needed - 1, &reported, &err));
    CHECK(reported == needed);
    SAYS("(got 0)", too_small, nbl_lock_text(lock, NBL_TEXT_KEY, copy, 0, NULL, &err));
    SAYS("got NULL", wrong, nbl_lock_text(lock, NBL_TEXT_KEY, NULL, needed, &needed, &err));
    ANSWERS(NBL_OK, nbl_lock_text(lock, NBL_TEXT_KEY, copy, needed, NULL, &err));
    CHECK(memcmp(copy, key, longest) == 0 && copy[longest] == '\0');
    ANSWERS(NBL_OK, nbl_lock_text(lock, NBL_TEXT_KEY, copy, SIZE_MAX, NULL, &err));
    ANSWERS(NBL_OK, nbl_list_free(list));
    ANSWERS(NBL_OK, nbl_unlock(lock, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));
    free(copy);
    free(key);

    static const int32_t no_fields[] = {INT32_MIN, -1, 0, 5, INT32_MAX};
    lock = open_lock(client, "text", NULL);
    for (size_t i = 0; i < sizeof no_fields / sizeof *no_fields; i++)
        SAYS("field must be", wrong, nbl_lock_text(lock, no_fields[i], NULL, 0, &needed, &err));
    SAYS("no owner token", wrong, nbl_lock_text(lock, NBL_TEXT_OWNER_TOKEN, NULL, 0, &needed, &err));
    ANSWERS(NBL_ERR_INVALID_OP, nbl_lock_text(lock, NBL_TEXT_INSTANCE_TOKEN, NULL, 0, &needed, &err));
    ANSWERS(NBL_OK, nbl_lock_free(lock));

    char owner[257];
    memset(owner, 'o', 256);
    owner[256] = '\0';
    SAYS("(got 256 bytes)", wrong, nbl_reentrant_lock_new(client, "k", 1, owner, NULL, &lock, &err));
    SAYS("(got an empty one)", wrong, nbl_reentrant_lock_new(client, "k", 1, "", NULL, &lock, &err));
    SAYS("must be UTF-8", wrong, nbl_reentrant_lock_new(client, "k", 1, "\x80", NULL, &lock, &err));
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
        status = nbl_client_new_start(wrong[i], NULL, &op, &err);
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

/* The errors of several hosts fit in a message. One that does not fit ends between two characters. */
static void messages(nbl_client_t *client)
{
    nbl_client_t *none = NULL;
    ANSWERS(NBL_ERR_UNREACHABLE,
            nbl_client_new("rethinkdb://127.0.0.1:1,127.0.0.2:1,127.0.0.3:1,127.0.0.4:1,127.0.0.5:1,127.0.0.6:1,"
                           "127.0.0.7:1,127.0.0.8:1/db",
                           NULL, &none, &err));
    CHECK(strstr(err.message, "127.0.0.1:1: Connection refused") && strstr(err.message, "127.0.0.8:1: Connection refused"));
    CHECK(strlen(err.message) > 256 && strlen(err.message) < NBL_ERROR_MESSAGE_SIZE - 1);

    char key[] = "\xe2\x82\xac\xe2\x82\xac\xe2\x82\xac\xc3\xa4\xc3\xa4"; /* three of 3 bytes, two of 2 */
    nbl_list_t *list = NULL;
    SAYS("\xe2\x82\xac", NBL_NOT_FOUND, nbl_find(client, key, NBL_CSTR, &list, &err));
    for (uint32_t room = 1; room <= strlen(err.message) + 1; room++) {
        nbl_error_t cut = {.struct_size = (uint32_t)offsetof(nbl_error_t, message) + room};
        CHECK(nbl_find(client, key, NBL_CSTR, &list, &cut) == NBL_NOT_FOUND);
        size_t length = strlen(cut.message);
        CHECK(length < room && length + 3 >= room && memcmp(cut.message, err.message, length) == 0);
        CHECK((err.message[length] & 0xc0) != 0x80);
    }
}

int main(void)
{
    static const char *const stores[] = {"memory:", "embedded:"};
    for (int i = 0; i < 2; i++) {
        nbl_client_t *client = open_client(stores[i]);
        option_values(client);
        keys_and_other_text(client);
        if (i == 0)
            messages(client);
        ANSWERS(NBL_OK, nbl_client_close(client, 0, &err));
        ANSWERS(NBL_OK, nbl_client_free(client));
    }
    urls();
    return 0;
}
