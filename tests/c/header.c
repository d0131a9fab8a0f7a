/* The header compiles alone, as the first line of a program, and twice. In C and in C++. */
#include <nblock.h>
#include <nblock.h>

extern uint32_t version_in_second_unit(void);

int main(void)
{
    static const nbl_client_options_t client_options = NBL_CLIENT_OPTIONS_INIT;
    static const nbl_lock_options_t lock_options = NBL_LOCK_OPTIONS_INIT;
    static const nbl_list_options_t list_options = NBL_LIST_OPTIONS_INIT;
    static const nbl_record_t record = NBL_RECORD_INIT;
    nbl_error_t err = NBL_ERROR_INIT;
    if (err.struct_size != sizeof err || client_options.struct_size != sizeof client_options ||
        lock_options.struct_size != sizeof lock_options || list_options.struct_size != sizeof list_options ||
        record.struct_size != sizeof record || err.message[0] || client_options.app)
        return 2;
    return nbl_unlock(NULL, &err) == NBL_ERR_BAD_HANDLE && version_in_second_unit() == NBL_ABI_VERSION ? 0 : 1;
}
