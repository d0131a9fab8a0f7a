/*
 * Every function that takes a handle, to be called with any handle at all.
 *
 * Each of the four functions below makes one of its calls, `which` counting from 0, and answers what
 * that answered; a descriptor counts as NBL_OK, and none as NBL_ERR_BAD_HANDLE. What a call gave is
 * freed again, and nothing that a call gives may have been written unless it answered NBL_OK.
 */
#ifndef CALLS_H
#define CALLS_H

#include "check.h"

enum { CLIENT_CALLS = 11, LOCK_CALLS = 15, OP_CALLS = 9, LIST_CALLS = 5 };

#define UNTOUCHED ((void *)0x5a5a5a50)
#define UNTOUCHED_NUMBER 0x5a5a5a5a5a5a5a5a

struct given {
    nbl_client_t *client;
    nbl_lock_t *lock;
    nbl_op_t *op;
    nbl_list_t *list;
    uint64_t number;
    nbl_lock_state_t state;
    size_t size;
    nbl_ping_t ping;
};

static inline nbl_status_t of_descriptor(int descriptor)
{
    return descriptor >= 0 ? NBL_OK : NBL_ERR_BAD_HANDLE;
}

static inline nbl_status_t settle(nbl_status_t status, struct given *given)
{
    if (status == NBL_OK) {
        if (given->client != UNTOUCHED)
            ANSWERS(NBL_OK, nbl_client_free(given->client));
        if (given->lock != UNTOUCHED)
            ANSWERS(NBL_OK, nbl_lock_free(given->lock));
        if (given->op != UNTOUCHED)
            ANSWERS(NBL_OK, nbl_op_free(given->op));
        if (given->list != UNTOUCHED)
            ANSWERS(NBL_OK, nbl_list_free(given->list));
    } else {
        CHECK(given->client == UNTOUCHED && given->lock == UNTOUCHED && given->op == UNTOUCHED);
        CHECK(given->list == UNTOUCHED && given->number == UNTOUCHED_NUMBER && given->state == 0);
        CHECK(given->ping.server[0] == '\0');
    }
    return status;
}

#define NOTHING_GIVEN \
    {UNTOUCHED, UNTOUCHED, UNTOUCHED, UNTOUCHED, UNTOUCHED_NUMBER, 0, UNTOUCHED_NUMBER, NBL_PING_INIT}

static inline nbl_status_t client_call(unsigned which, nbl_client_t *client)
{
    struct given given = NOTHING_GIVEN;
    char text[64];
    nbl_status_t status = NBL_ERR_INTERNAL;
    switch (which) {
    case 0: status = nbl_client_free(client); break;
    case 1: status = nbl_client_close(client, NBL_NO_WAIT, &err); break;
    case 2: status = nbl_client_location(client, text, sizeof text, &given.size, &err); break;
    case 3: status = nbl_client_ping(client, &given.ping, &err); break;
    case 4: status = nbl_client_ping_start(client, &given.op, &err); break;
    case 5: status = nbl_lock_new(client, "key", NBL_CSTR, NULL, &given.lock, &err); break;
    case 6: status = nbl_reentrant_lock_new(client, "key", 3, "owner", NULL, &given.lock, &err); break;
    case 7: status = nbl_list(client, NULL, &given.list, &err); break;
    case 8: status = nbl_list_start(client, NULL, &given.op, &err); break;
    case 9: status = nbl_find(client, "key", NBL_CSTR, &given.list, &err); break;
    case 10: status = nbl_find_start(client, "key", NBL_CSTR, &given.op, &err); break;
    default: CHECK(!"there are CLIENT_CALLS calls");
    }
    return settle(status, &given);
}

static inline nbl_status_t lock_call(unsigned which, nbl_lock_t *lock)
{
    struct given given = NOTHING_GIVEN;
    char text[64];
    nbl_lock_options_t brief = {.struct_size = sizeof brief, .timeout_ms = 1};
    nbl_status_t status = NBL_ERR_INTERNAL;
    switch (which) {
    case 0: status = nbl_lock_free(lock); break;
    case 1: status = nbl_try_lock(lock, NULL, &err); break;
    case 2: status = nbl_lock(lock, &brief, &err); break;
    case 3: status = nbl_lock_start(lock, &brief, &given.op, &err); break;
    case 4: status = nbl_unlock(lock, &err); break;
    case 5: status = nbl_unlock_start(lock, &given.op, &err); break;
    case 6: status = nbl_refresh(lock, NULL, &err); break;
    case 7: status = nbl_refresh_start(lock, NULL, &given.op, &err); break;
    case 8: status = nbl_lock_state(lock, &given.state, &err); break;
    case 9: status = nbl_lock_remaining_ms(lock, &given.number, &err); break;
    case 10: status = nbl_lock_expires_at_ms(lock, &given.number, &err); break;
    case 11: status = nbl_lock_fence(lock, &given.number, &err); break;
    case 12: status = nbl_lock_fence_start(lock, &given.op, &err); break;
    case 13: status = of_descriptor(nbl_lock_lost_fd(lock)); break;
    case 14: status = nbl_lock_text(lock, NBL_TEXT_KEY, text, sizeof text, &given.size, &err); break;
    default: CHECK(!"there are LOCK_CALLS calls");
    }
    return settle(status, &given);
}

static inline nbl_status_t op_call(unsigned which, nbl_op_t *op)
{
    struct given given = NOTHING_GIVEN;
    nbl_status_t status = NBL_ERR_INTERNAL;
    switch (which) {
    case 0: status = nbl_op_free(op); break;
    case 1: status = of_descriptor(nbl_op_fd(op)); break;
    case 2: status = nbl_op_wait(op, 1, &err); break;
    case 3: status = nbl_op_finish(op, &err); break;
    case 4: status = nbl_op_take_client(op, &given.client, &err); break;
    case 5: status = nbl_op_take_list(op, &given.list, &err); break;
    case 6: status = nbl_op_take_fence(op, &given.number, &err); break;
    case 7: status = nbl_op_cancel(op); break;
    case 8: status = nbl_op_take_ping(op, &given.ping, &err); break;
    default: CHECK(!"there are OP_CALLS calls");
    }
    return settle(status, &given);
}

static inline nbl_status_t list_call(unsigned which, nbl_list_t *list)
{
    struct given given = NOTHING_GIVEN;
    nbl_record_t record = {.struct_size = sizeof record};
    nbl_status_t status = NBL_ERR_INTERNAL;
    switch (which) {
    case 0: status = nbl_list_free(list); break;
    case 1: status = nbl_list_length(list, &given.size, &err); break;
    case 2: status = nbl_list_record(list, 0, &record, &err); break;
    case 3: status = nbl_break_start(list, 0, &given.op, &err); break;
    case 4: status = nbl_break(list, 0, &err); break;
    default: CHECK(!"there are LIST_CALLS calls");
    }
    return settle(status, &given);
}

#endif
