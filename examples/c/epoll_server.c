/*
 * A server in one thread that locks without ever blocking: while some clients ("visitors") wait for a lock, it
 * serves the others.
 *
 *     epoll_server        prints the port on 127.0.0.1 that it listens on; SIGTERM ends it
 *
 * A visitor sends a key and a line end. It gets the line "KEY FENCE" as soon as the lock on the key is granted, and
 * holds the lock until it closes its connection.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* accept4 */
#endif
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nblock.h>

struct visitor;

/* What epoll returns for a descriptor that is ready. */
struct source {
    enum { LISTENER, SIGNALS, SOCKET, ACQUIRE } kind;
    struct visitor *visitor;
};

struct visitor {
    struct source socket_ready, acquire_ready;
    int socket;
    char key[200];
    size_t length;
    nbl_lock_t *lock;
    nbl_op_t *acquire;
};

static nbl_error_t err = NBL_ERROR_INIT;
static nbl_client_t *client;
static int loop;

static void watch(int descriptor, struct source *source)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = source};
    epoll_ctl(loop, EPOLL_CTL_ADD, descriptor, &event);
}

static void arrives(int listener)
{
    struct visitor *visitor = calloc(1, sizeof *visitor);
    int socket = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (!visitor || socket < 0) {
        free(visitor);
        return;
    }
    visitor->socket = socket;
    visitor->socket_ready = (struct source){SOCKET, visitor};
    visitor->acquire_ready = (struct source){ACQUIRE, visitor};
    watch(socket, &visitor->socket_ready);
}

static void leaves(struct visitor *visitor)
{
    nbl_op_t *unlock = NULL;
    if (visitor->lock && !visitor->acquire && nbl_unlock_start(visitor->lock, &unlock, NULL) == NBL_OK)
        nbl_op_free(unlock); /* the unlock continues; nothing waits for its result */
    nbl_op_free(visitor->acquire); /* gives up an acquire that is in progress */
    nbl_lock_free(visitor->lock);
    close(visitor->socket);
    free(visitor);
}

static void answer(struct visitor *visitor, const char *text)
{
    char line[600];
    int length = snprintf(line, sizeof line, "%s %s\n", visitor->key, text);
    if (write(visitor->socket, line, (size_t)length) != length)
        shutdown(visitor->socket, SHUT_RDWR);
}

static void asks(struct visitor *visitor)
{
    /* Renewed while the visitor stays; the fence comes with the grant, so that asking for it does not wait. */
    nbl_lock_options_t options = {.struct_size = sizeof options,
                                  .timeout_ms = NBL_FOREVER,
                                  .auto_refresh = NBL_ON,
                                  .fence = NBL_ON};
    if (nbl_lock_new(client, visitor->key, NBL_CSTR, &options, &visitor->lock, &err) != NBL_OK ||
        nbl_lock_start(visitor->lock, NULL, &visitor->acquire, &err) != NBL_OK)
        answer(visitor, err.message);
    else
        watch(nbl_op_fd(visitor->acquire), &visitor->acquire_ready);
}

static void speaks(struct visitor *visitor)
{
    char *key = visitor->key;
    ssize_t got = read(visitor->socket, key + visitor->length, sizeof visitor->key - 1 - visitor->length);
    if (got <= 0 || visitor->lock) {
        leaves(visitor);
        return;
    }
    visitor->length += (size_t)got;
    key[visitor->length] = '\0';
    if (strchr(key, '\n')) {
        *strchr(key, '\n') = '\0';
        asks(visitor);
    }
}

static void gets_its_answer(struct visitor *visitor)
{
    uint64_t fence = 0;
    char number[32];
    nbl_status_t status = nbl_op_finish(visitor->acquire, &err);
    if (status == NBL_OK)
        status = nbl_lock_fence(visitor->lock, &fence, &err);
    snprintf(number, sizeof number, "%llu", (unsigned long long)fence);
    answer(visitor, status == NBL_OK ? number : err.message);
    /* Closes its descriptor, which also removes it from epoll. */
    nbl_op_free(visitor->acquire);
    visitor->acquire = NULL;
}

int main(void)
{
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    signal(SIGPIPE, SIG_IGN);
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);
    loop = epoll_create1(EPOLL_CLOEXEC);

    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(listener, (struct sockaddr *)&address, size) != 0 || listen(listener, 100) != 0 ||
        getsockname(listener, (struct sockaddr *)&address, &size) != 0) {
        perror("epoll_server");
        return 1;
    }
    /* This may wait, so it comes before the first visitor. nbl_client_new_start() is the form that does not wait. */
    if (nbl_client_new(NULL, NULL, &client, &err) != NBL_OK) {
        fprintf(stderr, "epoll_server: %s\n", err.message);
        return 1;
    }
    struct source listener_ready = {LISTENER, NULL}, signals_ready = {SIGNALS, NULL};
    watch(listener, &listener_ready);
    watch(signals, &signals_ready);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    for (struct source *source = NULL; !source || source->kind != SIGNALS;) {
        struct epoll_event event;
        /* One event at a time, so that no later event is for a visitor that this one has freed. */
        if (epoll_wait(loop, &event, 1, -1) != 1)
            continue;
        source = event.data.ptr;
        switch (source->kind) {
        case LISTENER: arrives(listener); break;
        case SOCKET: speaks(source->visitor); break;
        case ACQUIRE: gets_its_answer(source->visitor); break;
        case SIGNALS: break;
        }
    }
    /* Releases the holds, because they are renewed. */
    nbl_client_close(client, 0, NULL);
    nbl_client_free(client);
    return 0;
}
