/* Ignores whether the lock was granted: the compiler must warn. In C and in C++. */
#include <nblock.h>

int main(void)
{
    nbl_try_lock(NULL, NULL, NULL);
    return 0;
}
