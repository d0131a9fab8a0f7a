//! Checks the arguments from Python: a wrong type is a `TypeError`, a wrong value a `ValueError`, and both
//! name the argument and the rule.

use std::ffi::CString;

use nblock::ffi::{NBL_FOREVER, NBL_NO_WAIT, NBL_OFF, NBL_ON, nbl_lock_options_t};
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyString};

use crate::client::Client;
use crate::once::Once;

pub type Argument<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// The shortest and the longest lease, in seconds (R21).
const SHORTEST_EXPIRE: f64 = 0.001;
const LONGEST_EXPIRE: f64 = 366.0 * 86_400.0;

/// The longest key, in bytes (R21).
const LONGEST_KEY: usize = 1 << 20;

/// From this many seconds on, a timeout means forever: 300 years.
const FOREVER_FROM: f64 = 300.0 * 366.0 * 86_400.0;

fn name_of(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "object".to_string(), |name| name.to_string())
}

fn type_error(argument: &str, rule: &str, value: &Bound<'_, PyAny>) -> PyErr {
    PyTypeError::new_err(format!("{argument} must be {rule}, not {}", name_of(value)))
}

fn seconds(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<f64> {
    const RULE: &str = "a number of seconds (int or float) or a datetime.timedelta";
    if value.is_instance_of::<PyBool>() {
        return Err(type_error(argument, RULE, value));
    }
    let error = match value.extract::<f64>() {
        Ok(seconds) => return Ok(seconds),
        Err(error) => error,
    };
    let py = value.py();
    if error.is_instance_of::<PyOverflowError>(py) {
        Err(PyValueError::new_err(format!("{argument} is too large a number of seconds")))
    } else if !error.is_instance_of::<PyTypeError>(py) {
        Err(error)
    } else if value.is_instance(TIMEDELTA.import(py, "datetime", "timedelta")?)? {
        value.call_method0("total_seconds")?.extract()
    } else {
        Err(type_error(argument, RULE, value))
    }
}

static TIMEDELTA: Once<Py<PyAny>> = Once::new();

/// The limit of one request, or of opening a store, in milliseconds; 0 for `None`, which means the default.
pub fn limit(argument: &str, value: Argument<'_, '_>) -> PyResult<i64> {
    let Some(value) = value else { return Ok(0) };
    let length = seconds(argument, value)?;
    if !(0.001..=3600.0).contains(&length) {
        return Err(PyValueError::new_err(format!("{argument} must be between 0.001 s and 3600 s (got {length} s)")));
    }
    Ok((length * 1000.0).round() as i64)
}

/// `expire` in milliseconds; 0 for `None`, which means the default.
pub fn expire(value: Argument<'_, '_>) -> PyResult<i64> {
    let Some(value) = value else { return Ok(0) };
    let length = seconds("expire", value)?;
    if !(SHORTEST_EXPIRE..=LONGEST_EXPIRE).contains(&length) {
        return Err(PyValueError::new_err(format!(
            "expire must be between 0.001 s and 31622400 s, which is 366 days (got {length} s)"
        )));
    }
    Ok((length * 1000.0).round() as i64)
}

/// A number of seconds, 0 or more, as a timeout of the library in milliseconds.
fn timeout_ms(length: f64) -> i64 {
    if length == 0.0 {
        NBL_NO_WAIT
    } else if length >= FOREVER_FROM {
        NBL_FOREVER
    } else {
        // Never down to 0, which would mean the default.
        (length * 1000.0).ceil() as i64
    }
}

/// `timeout` in milliseconds; 0 for `None`, which means the default.
pub fn timeout(value: Argument<'_, '_>) -> PyResult<i64> {
    let Some(value) = value else { return Ok(0) };
    let length = seconds("timeout", value)?;
    if length.is_nan() || length < 0.0 {
        return Err(PyValueError::new_err(format!(
            "timeout must be 0 s (one try) or more; math.inf waits forever (got {length} s)"
        )));
    }
    Ok(timeout_ms(length))
}

/// `blocking` and `timeout` as `threading.Lock.acquire` takes them.
pub fn acquire_timeout(blocking: bool, value: Argument<'_, '_>) -> PyResult<i64> {
    /// `threading.TIMEOUT_MAX` of 64-bit CPython, rounded down.
    const TIMEOUT_MAX: f64 = 9_223_372_036.0;
    let length = match value {
        None => -1.0,
        Some(value) => seconds("timeout", value)?,
    };
    if !blocking {
        return match length {
            -1.0 => Ok(NBL_NO_WAIT),
            _ => Err(PyValueError::new_err("can't specify a timeout for a non-blocking call: leave timeout at -1")),
        };
    }
    if length == -1.0 || length == f64::INFINITY {
        return Ok(NBL_FOREVER);
    }
    if length > TIMEOUT_MAX {
        return Err(PyOverflowError::new_err(format!(
            "timeout must be at most {TIMEOUT_MAX} s, or -1 to wait forever (got {length} s)"
        )));
    }
    if length.is_nan() || length < 0.0 {
        return Err(PyValueError::new_err(format!(
            "timeout must be non-negative, or -1 to wait forever (got {length} s)"
        )));
    }
    Ok(timeout_ms(length))
}

fn switch(argument: &str, value: Argument<'_, '_>) -> PyResult<i32> {
    match value {
        None => Ok(0),
        Some(value) => match value.cast::<PyBool>() {
            Ok(value) => Ok(if value.is_true() { NBL_ON } else { NBL_OFF }),
            Err(_) => Err(type_error(argument, "True, False or None", value)),
        },
    }
}

/// Options of a lock or of one call.
pub fn lock_options(
    expire_given: Argument<'_, '_>,
    timeout_given: Argument<'_, '_>,
    auto_refresh: Argument<'_, '_>,
    fence: Argument<'_, '_>,
) -> PyResult<nbl_lock_options_t> {
    Ok(nbl_lock_options_t {
        struct_size: size_of::<nbl_lock_options_t>() as u32,
        auto_refresh: switch("auto_refresh", auto_refresh)?,
        expire_ms: expire(expire_given)?,
        timeout_ms: timeout(timeout_given)?,
        if_held: 0,
        fence: switch("fence", fence)?,
    })
}

/// A text argument.
fn text<'a>(argument: &str, value: &'a Bound<'_, PyAny>) -> PyResult<&'a str> {
    let value = value.cast::<PyString>().map_err(|_| type_error(argument, "str", value))?;
    value.to_str().map_err(|_| {
        PyValueError::new_err(format!(
            "{argument} must be text that UTF-8 can encode (got {}, with a lone surrogate)",
            value.repr().map_or_else(|_| String::new(), |shown| shown.to_string())
        ))
    })
}

/// A key: any text of 1 byte to 1 MiB in UTF-8, NUL included (R21).
pub fn key<'a>(value: &'a Bound<'_, PyAny>) -> PyResult<&'a str> {
    let key = text("key", value)?;
    if key.is_empty() || key.len() > LONGEST_KEY {
        return Err(PyValueError::new_err(format!(
            "key must have 1 byte to 1 MiB (1048576 bytes) of UTF-8 (got {} bytes)",
            key.len()
        )));
    }
    Ok(key)
}

/// A text for a NUL-terminated parameter of the library.
pub fn c_text(argument: &str, value: &Bound<'_, PyAny>) -> PyResult<CString> {
    CString::new(text(argument, value)?)
        .map_err(|_| PyValueError::new_err(format!("{argument} must not contain a NUL character")))
}

/// An owner token of a reentrant lock: 1 to 255 bytes of UTF-8 (R17).
pub fn owner_token(value: Argument<'_, '_>) -> PyResult<Option<CString>> {
    let Some(value) = value else { return Ok(None) };
    let owner = c_text("owner_token", value)?;
    match owner.as_bytes().len() {
        1..=255 => Ok(Some(owner)),
        length => {
            Err(PyValueError::new_err(format!("owner_token must have 1 to 255 bytes of UTF-8 (got {length} bytes)")))
        }
    }
}

/// A client.
pub fn client(value: &Bound<'_, PyAny>) -> PyResult<Py<Client>> {
    match value.cast::<Client>() {
        Ok(client) => Ok(client.clone().unbind()),
        Err(_) => Err(type_error("client", "an nblock.Client or None", value)),
    }
}

/// A callable or `None`.
pub fn callable(argument: &str, value: Argument<'_, '_>) -> PyResult<Option<Py<PyAny>>> {
    match value {
        None => Ok(None),
        Some(value) if value.is_callable() => Ok(Some(value.clone().unbind())),
        Some(value) => Err(type_error(argument, "a callable or None", value)),
    }
}
