// Objects that live to the end: static ones, those of threads, and calls from atexit. Argument: the URL
// of a store. What they held is released when they are destroyed, whatever of the process is gone by then.
#include <cstdlib>
#include <thread>

#include "check.hpp"

static std::string url;

static nblock::client &client_of_all()
{
    static nblock::client client(url);
    return client;
}

// Constructed first, destroyed last: looks whether all is free.
struct looks_at_the_end {
    ~looks_at_the_end()
    {
        const nblock::client client(url);
        if (!client.list().empty()) {
            std::fprintf(stderr, "at_exit: %s is held still\n", (*client.list().begin()).key.c_str());
            std::_Exit(1);
        }
    }
};

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    url = argv[1];
    static const looks_at_the_end last;
    static nblock::lock held(client_of_all(), "static");
    held.lock();
    static nblock::lock contended(client_of_all(), "static");
    // Under way when the process ends: it is granted when the one before is destroyed, or given up.
    static nblock::operation<bool> waiting = contended.lock_start();
    std::atexit([] {
        nblock::lock late(client_of_all(), "late");
        late.synchronize([] {});
    });
    std::thread([] {
        thread_local nblock::lock of_thread(client_of_all(), "thread");
        of_thread.lock();
    }).join();
    CHECK(is_free(client_of_all(), "thread"));
    thread_local nblock::lock of_main(client_of_all(), "thread of main");
    of_main.lock();
}
