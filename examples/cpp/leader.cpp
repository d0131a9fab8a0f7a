// Of several processes, the one that holds the lock leads. It stops leading as soon as it knows that the lock is lost.
//
//     leader NAME
//
// SIGTERM and SIGINT end it; another process then gets the lead.
#include <csignal>
#include <iostream>

#include <poll.h>
#include <sys/signalfd.h>

#include <nblock.hpp>

using namespace std::chrono_literals;

// Returns which of two descriptors is readable first; 0 if neither is in time.
static int first_of(int one, int two, int timeout_ms)
{
    pollfd both[] = {{one, POLLIN, 0}, {two, POLLIN, 0}};
    if (poll(both, 2, timeout_ms) <= 0)
        return 0;
    return both[1].revents ? two : one;
}

// Leads until the lead is lost or a signal arrives.
static void lead(const std::string &name, nblock::lock &lock, int signals)
{
    std::cout << name << " leads, fence " << lock.fence() << std::endl;
    const int lost = lock.lost_fd();
    while (first_of(lost, signals, 100) == 0) {
        // One round of the leader's work. It sends the fence with everything that it writes.
    }
    lock.unlock();
    if (lock.lost())
        std::cout << name << " has lost the lead" << std::endl;
}

int main(int argc, char **argv)
try {
    if (argc != 2) {
        std::cerr << "usage: leader NAME\n";
        return 64;
    }
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigprocmask(SIG_BLOCK, &ends, nullptr);
    const int signals = signalfd(-1, &ends, SFD_CLOEXEC);

    const nblock::client client;
    nblock::lock_options options;
    options.expire = 3s; // if this process dies, another one leads 3 s later at most
    options.auto_refresh = true;
    options.timeout = nblock::forever;
    nblock::lock lock(client, "leader", options);
    for (bool ended = false; !ended; ended = first_of(signals, signals, 0) != 0) {
        auto election = lock.lock_start();
        std::cout << argv[1] << " stands for election" << std::endl;
        while (first_of(election.fd(), signals, -1) == 0) {
        }
        if (election.ready() && election.get())
            lead(argv[1], lock, signals);
    }
    std::cout << argv[1] << " ends\n";
} catch (const std::exception &error) {
    std::cerr << argv[1] << ": " << error.what() << '\n';
    return 1;
}
