/* The header compiles alone, as the first line of a program, and twice. In C and in C++. */
#include <nblock.h>
#include <nblock.h>

extern uint32_t version_in_second_unit(void);

int main(void)
{
    nbl_error_t err = {sizeof err, NBL_OK, ""};
    return nbl_unlock(NULL, &err) == NBL_ERR_BAD_HANDLE && version_in_second_unit() == NBL_ABI_VERSION ? 0 : 1;
}
