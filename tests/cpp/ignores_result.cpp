// Ignores whether the lock was granted: the compiler must warn.
#include <nblock.hpp>

void ignores(nblock::lock &lock)
{
    lock.try_lock();
}
