/* Prints the moment as the history test's notes have it: nanoseconds since boot. For the shell's worker. */
#define _GNU_SOURCE

#include <stdio.h>
#include <time.h>

int main(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    printf("%lld\n", now.tv_sec * 1000000000LL + now.tv_nsec);
    return 0;
}
