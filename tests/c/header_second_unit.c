/* The second translation unit of header.c. */
#include <nblock.h>

extern uint32_t version_in_second_unit(void);

uint32_t version_in_second_unit(void)
{
    return nbl_abi_version();
}
