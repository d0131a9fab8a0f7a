// A server in one thread that locks without ever blocking: while some clients ("visitors") wait for a lock, it
// serves the others.
//
//     epoll_server        prints the port on 127.0.0.1 that it listens on; SIGTERM ends it
//
// A visitor sends a key and a line end. It gets the line "KEY FENCE" as soon as the lock on the key is granted, and
// holds the lock until it closes its connection.
#include <csignal>
#include <cstdio>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>

#include <arpa/inet.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nblock.hpp>

// Calls what was registered for a descriptor when it is readable.
class event_loop {
  public:
    void watch(int descriptor, std::function<void()> ready)
    {
        epoll_event event{};
        event.events = EPOLLIN | EPOLLRDHUP;
        event.data.fd = descriptor;
        epoll_ctl(loop_, EPOLL_CTL_ADD, descriptor, &event);
        ready_[descriptor] = std::move(ready);
    }

    void forget(int descriptor)
    {
        epoll_ctl(loop_, EPOLL_CTL_DEL, descriptor, nullptr);
        ready_.erase(descriptor);
    }

    void stop() { running_ = false; }

    void run()
    {
        while (running_) {
            epoll_event event{};
            if (epoll_wait(loop_, &event, 1, -1) != 1)
                continue;
            // A copy, because the function may remove itself.
            if (const auto found = ready_.find(event.data.fd); found != ready_.end())
                std::function<void()>(found->second)();
        }
    }

  private:
    int loop_ = epoll_create1(EPOLL_CLOEXEC);
    bool running_ = true;
    std::map<int, std::function<void()>> ready_;
};

class visitor {
  public:
    visitor(event_loop &loop, const nblock::client &client, int socket) : loop_(loop), client_(client), socket_(socket)
    {
    }
    visitor(const visitor &) = delete;
    visitor &operator=(const visitor &) = delete;

    ~visitor()
    {
        if (acquire_)
            loop_.forget(acquire_->fd());
        else if (lock_)
            (void)lock_->unlock_start(); // the unlock continues; nothing waits for its result
        loop_.forget(socket_);
        close(socket_);
    }

    // Returns false if the visitor has closed its connection.
    bool speaks()
    {
        char text[200];
        const ssize_t got = read(socket_, text, sizeof text);
        if (got <= 0 || lock_)
            return false;
        said_.append(text, static_cast<std::size_t>(got));
        if (const auto end = said_.find('\n'); end != std::string::npos)
            asks(said_.substr(0, end));
        return true;
    }

  private:
    void asks(const std::string &key)
    try {
        nblock::lock_options options;
        options.timeout = nblock::forever;
        options.fence = true; // comes with the grant, so that asking for it does not wait
        lock_.emplace(client_, key, options);
        acquire_ = lock_->lock_start();
        loop_.watch(acquire_->fd(), [this] { gets_its_answer(); });
    } catch (const nblock::error &error) {
        answer(key + " " + error.what());
    }

    void gets_its_answer()
    {
        loop_.forget(acquire_->fd());
        try {
            acquire_->get();
            answer(lock_->key() + " " + std::to_string(lock_->fence()));
        } catch (const nblock::error &error) {
            answer(lock_->key() + " " + error.what());
        }
        acquire_.reset();
    }

    void answer(const std::string &text)
    {
        const std::string line = text + "\n";
        if (write(socket_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
            shutdown(socket_, SHUT_RDWR);
    }

    event_loop &loop_;
    const nblock::client &client_;
    int socket_;
    std::string said_;
    std::optional<nblock::lock> lock_;
    std::optional<nblock::operation<bool>> acquire_;
};

int main()
try {
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, nullptr);
    std::signal(SIGPIPE, SIG_IGN);

    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (bind(listener, reinterpret_cast<sockaddr *>(&address), size) != 0 || listen(listener, 100) != 0 ||
        getsockname(listener, reinterpret_cast<sockaddr *>(&address), &size) != 0)
        throw std::system_error(errno, std::generic_category(), "listen");

    // This may wait, so it comes before the first visitor. client::open_start is the form that does not wait.
    const nblock::client client;
    event_loop loop;
    std::map<int, visitor> visitors;
    loop.watch(signalfd(-1, &ends, SFD_CLOEXEC), [&] { loop.stop(); });
    loop.watch(listener, [&] {
        const int socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (socket < 0)
            return;
        visitor &arrived = visitors.try_emplace(socket, loop, client, socket).first->second;
        loop.watch(socket, [&visitors, &arrived, socket] {
            if (!arrived.speaks())
                visitors.erase(socket);
        });
    });
    std::cout << ntohs(address.sin_port) << std::endl;
    loop.run();
} catch (const std::exception &error) {
    std::cerr << "epoll_server: " << error.what() << '\n';
    return 1;
}
