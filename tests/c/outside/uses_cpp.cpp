// A C++ program of somebody else's: locks once, with what was installed and nothing else.
#include <nblock.hpp>

#include <iostream>

int main()
{
    nblock::client client("embedded:");
    nblock::lock lock(client, "outside");
    lock.synchronize([] { std::cout << nbl_version() << '\n'; });
}
