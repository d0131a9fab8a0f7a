/* Prints the layout of every public struct, and every public number, to be compared with layout.txt. */
#include <stdio.h>

#include <nblock.h>

#define STRUCT(type) printf("%s: %zu bytes, aligned to %zu\n", #type, sizeof(type), _Alignof(type))
#define FIELD(type, field) \
    printf("  %-20s at %3zu, %3zu bytes\n", #field, offsetof(type, field), sizeof(((type *)0)->field))
#define NUMBER(name) printf("%-24s %lld\n", #name, (long long)(name))

int main(void)
{
    STRUCT(nbl_error_t);
    FIELD(nbl_error_t, struct_size);
    FIELD(nbl_error_t, status);
    FIELD(nbl_error_t, message);
    STRUCT(nbl_client_options_t);
    FIELD(nbl_client_options_t, struct_size);
    FIELD(nbl_client_options_t, reserved);
    FIELD(nbl_client_options_t, expire_ms);
    FIELD(nbl_client_options_t, timeout_ms);
    FIELD(nbl_client_options_t, op_timeout_ms);
    FIELD(nbl_client_options_t, connect_timeout_ms);
    FIELD(nbl_client_options_t, app);
    STRUCT(nbl_lock_options_t);
    FIELD(nbl_lock_options_t, struct_size);
    FIELD(nbl_lock_options_t, auto_refresh);
    FIELD(nbl_lock_options_t, expire_ms);
    FIELD(nbl_lock_options_t, timeout_ms);
    FIELD(nbl_lock_options_t, if_held);
    FIELD(nbl_lock_options_t, fence);
    STRUCT(nbl_list_options_t);
    FIELD(nbl_list_options_t, struct_size);
    FIELD(nbl_list_options_t, filter);
    STRUCT(nbl_record_t);
    FIELD(nbl_record_t, struct_size);
    FIELD(nbl_record_t, pid);
    FIELD(nbl_record_t, remaining_ms);
    FIELD(nbl_record_t, expires_at_ms);
    FIELD(nbl_record_t, acquired_at_ms);
    FIELD(nbl_record_t, fence);
    FIELD(nbl_record_t, reentrant_count);
    FIELD(nbl_record_t, expired);
    STRUCT(nbl_status_t);
    STRUCT(nbl_log_fn);

    /* Every number of the header, in its order: the test compares their names with the header's. */
    NUMBER(NBL_CSTR);
    NUMBER(NBL_ERROR_MESSAGE_SIZE);
    NUMBER(NBL_NO_WAIT);
    NUMBER(NBL_FOREVER);
    NUMBER(NBL_ON);
    NUMBER(NBL_OFF);
    NUMBER(NBL_IF_HELD_ERROR);
    NUMBER(NBL_IF_HELD_WAIT);
    NUMBER(NBL_LIST_ALL);
    NUMBER(NBL_LIST_EXPIRED);
    NUMBER(NBL_ABI_VERSION);
    NUMBER(NBL_TEXT_KEY);
    NUMBER(NBL_TEXT_KEY_HASH);
    NUMBER(NBL_TEXT_HOST);
    NUMBER(NBL_TEXT_BOOT_ID);
    NUMBER(NBL_TEXT_APP);
    NUMBER(NBL_TEXT_INSTANCE_TOKEN);
    NUMBER(NBL_TEXT_OWNER_TOKEN);
    NUMBER(NBL_TEXT_DAMAGED);
    NUMBER(NBL_TEXT_VERSION);
    NUMBER(NBL_LOG_ERROR);
    NUMBER(NBL_LOG_WARN);
    NUMBER(NBL_LOG_INFO);
    NUMBER(NBL_LOG_DEBUG);
    NUMBER(NBL_LOG_TRACE);
    NUMBER(NBL_OK);
    NUMBER(NBL_UNAVAILABLE);
    NUMBER(NBL_LOST);
    NUMBER(NBL_NOT_FOUND);
    NUMBER(NBL_PENDING);
    NUMBER(NBL_CANCELLED);
    NUMBER(NBL_OVERDUE);
    NUMBER(NBL_ERR_INVALID_OP);
    NUMBER(NBL_ERR_INVALID_ARGUMENT);
    NUMBER(NBL_ERR_BAD_HANDLE);
    NUMBER(NBL_ERR_UNREACHABLE);
    NUMBER(NBL_ERR_INDETERMINATE);
    NUMBER(NBL_ERR_DENIED);
    NUMBER(NBL_ERR_STORE);
    NUMBER(NBL_ERR_FORKED);
    NUMBER(NBL_ERR_INTERNAL);
    NUMBER(NBL_ERR_RESOURCES);
    return 0;
}
