//! Out-parameters: written last, and only on success.

use super::error::{Failure, guard, nbl_error_t};
use super::status::{NBL_OK, nbl_status_t};

/// Runs the body of a call that has an out-parameter. The parameter is checked before anything is done.
///
/// # Safety
/// `out` is NULL or may be written.
pub(crate) unsafe fn write_out_param<T>(
    out: *mut T,
    err: *mut nbl_error_t,
    body: impl FnOnce() -> Result<T, Failure>,
) -> nbl_status_t {
    guard(err, || {
        out_given(out)?;
        let value = body()?;
        // SAFETY: guaranteed by the caller (see "Safety"), and `out` is not NULL.
        unsafe { out.write(value) };
        Ok(NBL_OK)
    })
}

/// Checks that an out-parameter is not NULL, and is aligned.
pub(crate) fn out_given<T>(out: *mut T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid_argument("out must not be NULL: the result is written there"));
    }
    if !out.is_aligned() {
        return Err(Failure::invalid_argument(format!(
            "out must be an address of the result's type, a multiple of {} (got {out:?})",
            align_of::<T>()
        )));
    }
    Ok(())
}
