/* A program of somebody else's: locks once, with what was installed and nothing else. */
#include <nblock.h>

#include <stdio.h>

int main(void)
{
    nbl_error_t err = {.struct_size = sizeof err};
    nbl_client_t *client = NULL;
    nbl_lock_t *lock = NULL;
    if (nbl_client_new("embedded:", NULL, &client, &err) != NBL_OK ||
        nbl_lock_new(client, "outside", NBL_CSTR, NULL, &lock, &err) != NBL_OK || nbl_lock(lock, NULL, &err) != NBL_OK ||
        nbl_unlock(lock, &err) != NBL_OK || nbl_client_close(client, 0, &err) != NBL_OK) {
        fprintf(stderr, "%s: %s\n", nbl_status_name(err.status), err.message);
        return 1;
    }
    nbl_lock_free(lock);
    nbl_client_free(client);
    puts(nbl_version());
    return 0;
}
