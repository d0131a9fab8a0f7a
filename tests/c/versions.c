/*
 * Programs that were built with an older header, whose structs are shorter, and with a newer one,
 * whose structs are longer: each struct lies in memory of exactly its size, for a checker to watch.
 */
#include "check.h"

/* A struct of which the first `known` bytes are `content`, and that says it has `size` bytes. */
static void *sized(uint32_t size, const void *content, size_t known)
{
    unsigned char *memory = calloc(1, size);
    CHECK(memory != NULL);
    memcpy(memory, content, known < size ? known : size);
    memcpy(memory, &size, sizeof size < size ? sizeof size : size);
    return memory;
}

static void options_of_locks(nbl_client_t *client)
{
    nbl_lock_t *lock = open_lock(client, "versions", NULL);
    const nbl_lock_options_t full = {
        .auto_refresh = NBL_OFF, .expire_ms = 7000, .timeout_ms = 1, .if_held = NBL_IF_HELD_WAIT, .fence = NBL_ON};
    uint64_t remaining = 0;

    /* What an older struct does not have is as if it were zero. */
    for (uint32_t size = 4; size <= sizeof full; size++) {
        void *older = sized(size, &full, sizeof full);
        if (size != 4 && size != 8 && size != 16 && size != 24 && size != 28 && size != 32) {
            SAYS("in the middle of a field", NBL_ERR_INVALID_ARGUMENT, nbl_try_lock(lock, older, &err));
            free(older);
            continue;
        }
        ANSWERS(NBL_OK, nbl_try_lock(lock, older, &err));
        ANSWERS(NBL_OK, nbl_lock_remaining_ms(lock, &remaining, &err));
        CHECK(size >= 16 ? remaining <= 7000 : remaining > 7000);
        ANSWERS(NBL_OK, nbl_unlock(lock, &err));
        free(older);
    }
    /* A newer struct is good as long as what is not known here is zero, wherever it is not. */
    for (uint32_t size = sizeof full; size <= 4096; size += size < 64 ? 1 : 1008) {
        unsigned char *newer = sized(size, &full, sizeof full);
        ANSWERS(NBL_OK, nbl_try_lock(lock, (void *)newer, &err));
        ANSWERS(NBL_OK, nbl_unlock(lock, &err));
        if (size > sizeof full) {
            newer[size - 1] = 1;
            SAYS("does not know", NBL_ERR_INVALID_ARGUMENT, nbl_try_lock(lock, (void *)newer, &err));
            newer[size - 1] = 0;
            newer[sizeof full] = 0x80;
            SAYS("at byte 32", NBL_ERR_INVALID_ARGUMENT, nbl_try_lock(lock, (void *)newer, &err));
        }
        free(newer);
    }
    /* No size at all, or one that nobody meant. */
    static const uint32_t none[] = {0, 1, 3, 4097, UINT32_MAX / 2, UINT32_MAX};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        uint32_t *wrong = malloc(sizeof *wrong);
        *wrong = none[i];
        SAYS("struct_size must be sizeof(nbl_lock_options_t)", NBL_ERR_INVALID_ARGUMENT,
             nbl_try_lock(lock, (void *)wrong, &err));
        free(wrong);
    }
    ANSWERS(NBL_OK, nbl_lock_free(lock));
}

static void other_options(nbl_client_t *client)
{
    nbl_client_t *second = NULL;
    nbl_list_t *list = NULL;
    const nbl_client_options_t full = {
        .expire_ms = 7000, .timeout_ms = 1, .op_timeout_ms = 2000, .connect_timeout_ms = 2000, .app = "versions"};
    for (uint32_t size = 4; size <= 64; size += 4) {
        void *other = sized(size, &full, sizeof full);
        if (size != 4 && size % 8 != 0 && size < sizeof full) {
            /* Half a pointer, for one, would not be good to follow. */
            SAYS("in the middle of a field", NBL_ERR_INVALID_ARGUMENT, nbl_client_new("memory:", other, &second, &err));
        } else {
            ANSWERS(NBL_OK, nbl_client_new("memory:", other, &second, &err));
            ANSWERS(NBL_OK, nbl_client_free(second));
        }
        free(other);
    }
    const nbl_list_options_t expired = {.filter = NBL_LIST_EXPIRED};
    for (uint32_t size = 4; size <= 16; size += 4) {
        void *other = sized(size, &expired, sizeof expired);
        size_t length = 99;
        ANSWERS(NBL_OK, nbl_list(client, other, &list, &err));
        ANSWERS(NBL_OK, nbl_list_length(list, &length, &err));
        CHECK(length == (size == 4 ? 1 : 0));
        ANSWERS(NBL_OK, nbl_list_free(list));
        free(other);
    }
}

/* Records are read by programs of any version: what these do not know is not written, and what the
 * library does not know is zero. */
static void records(nbl_client_t *client)
{
    nbl_list_t *list = NULL;
    nbl_record_t whole = {.struct_size = sizeof whole};
    ANSWERS(NBL_OK, nbl_list(client, NULL, &list, &err));
    ANSWERS(NBL_OK, nbl_list_record(list, 0, &whole, &err));
    CHECK(whole.pid == (uint32_t)getpid() && whole.remaining_ms > 0 && !whole.expired && !whole.foreign);
    CHECK(whole.struct_size == sizeof whole);
    CHECK(strcmp(whole.key, "held") == 0 && whole.key_len == 4 && strlen(whole.key_hash) == 28);
    CHECK(*whole.host && *whole.boot_id && *whole.app && strlen(whole.version) == 16 && !*whole.damaged);
    for (uint32_t size = 4; size <= 256; size += 4) {
        unsigned char *other = malloc(size);
        memset(other, 0xee, size);
        memcpy(other, &size, sizeof size);
        if (size != 4 && size != 44 && size != 116 && size % 8 != 0 && size < sizeof whole) {
            /* Half a pointer would not be good to follow. */
            SAYS("in the middle of a field", NBL_ERR_INVALID_ARGUMENT, nbl_list_record(list, 0, (void *)other, &err));
            CHECK(other[4] == 0xee);
            free(other);
            continue;
        }
        ANSWERS(NBL_OK, nbl_list_record(list, 0, (void *)other, &err));
        CHECK(memcmp(other, &size, sizeof size) == 0);
        const size_t known = size < sizeof whole ? size : sizeof whole;
        CHECK(memcmp(other + 4, (const unsigned char *)&whole + 4, known - 4) == 0);
        for (size_t i = sizeof whole; i < size; i++)
            CHECK(other[i] == 0);
        free(other);
    }
    static const uint32_t none[] = {0, 3, 4097, UINT32_MAX};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        whole.struct_size = none[i];
        SAYS("struct_size must be sizeof(nbl_record_t)", NBL_ERR_INVALID_ARGUMENT,
             nbl_list_record(list, 0, &whole, &err));
    }
    ANSWERS(NBL_OK, nbl_list_free(list));
}

/* As for records. */
static void pings(nbl_client_t *client)
{
    nbl_ping_t whole = NBL_PING_INIT;
    ANSWERS(NBL_OK, nbl_client_ping(client, &whole, &err));
    CHECK(whole.server[0] && whole.location[0] && !whole.caveats[0] && whole.struct_size == sizeof whole);
    for (uint32_t size = 4; size <= 2048; size += 4) {
        unsigned char *other = malloc(size);
        memset(other, 0xee, size);
        memcpy(other, &size, sizeof size);
        static const uint32_t older[] = {4, 8, 16, 24, 280, 792};
        int fits = size >= sizeof whole;
        for (size_t i = 0; i < sizeof older / sizeof *older; i++)
            fits |= size == older[i];
        if (fits) {
            ANSWERS(NBL_OK, nbl_client_ping(client, (void *)other, &err));
            const unsigned char *texts = (const unsigned char *)&whole + 24;
            if (size > 24)
                CHECK(memcmp(other + 24, texts, (size < sizeof whole ? size : sizeof whole) - 24) == 0);
        } else {
            SAYS("in the middle of a field", NBL_ERR_INVALID_ARGUMENT, nbl_client_ping(client, (void *)other, &err));
            CHECK(other[4] == 0xee);
        }
        for (size_t i = sizeof whole; i < size; i++)
            CHECK(other[i] == 0);
        free(other);
    }
}

int main(void)
{
    nbl_client_t *client = open_client("memory:");
    options_of_locks(client);
    nbl_lock_t *held = open_lock(client, "held", NULL);
    ANSWERS(NBL_OK, nbl_lock(held, NULL, &err));
    other_options(client);
    records(client);
    pings(client);
    ANSWERS(NBL_OK, nbl_unlock(held, &err));
    ANSWERS(NBL_OK, nbl_lock_free(held));
    ANSWERS(NBL_OK, nbl_client_free(client));
    return 0;
}
