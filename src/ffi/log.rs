//! The library's log, for a callback of the program.

use std::ffi::{CString, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tracing::Level;

use super::callback;
use super::error::{Failure, guard};
use super::status::{NBL_OK, nbl_status_t};
use super::text;
use crate::log;
use crate::sys::mutex::Mutex;
use crate::sys::process::PerProcess;
use crate::sys::runtime;

/// level of nbl_log_set(): errors only.
pub const NBL_LOG_ERROR: i32 = 1;
/// level of nbl_log_set(): what needs attention, such as a lost hold.
pub const NBL_LOG_WARN: i32 = 2;
/// level of nbl_log_set(): useful information, such as which store is used and why. The default.
pub const NBL_LOG_INFO: i32 = 3;
/// level of nbl_log_set(): what helps to find the cause of a problem.
pub const NBL_LOG_DEBUG: i32 = 4;
/// level of nbl_log_set(): everything.
pub const NBL_LOG_TRACE: i32 = 5;

/// Receives one line of the log.
///
/// level is the line's level (NBL_LOG_...). line is NUL-terminated UTF-8 without a line end, and
/// valid during the call only. user is the pointer that was passed to nbl_log_set.
///
/// Called on a library thread that does nothing else, one line at a time. Inside it, nbl_*
/// functions return NBL_ERR_INVALID_OP.
pub type nbl_log_fn = Option<unsafe extern "C" fn(level: i32, line: *const c_char, user: *mut c_void)>;

/// The callback. Atomic, so that a forked child can read it at any moment.
static CALLBACK: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static USER: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
/// Counts the calls of nbl_log_set. Lines from before the last call are dropped.
static SETTING: AtomicU64 = AtomicU64::new(0);

static LINES: PerProcess<Lines> = PerProcess::new();

/// The queue of the thread that calls the callback.
struct Lines {
    sender: SyncSender<(u64, i32, CString)>,
    /// Locked while the callback runs.
    calling: std::sync::Arc<Mutex<()>>,
}

/// How many lines may wait for the callback. Further lines are dropped.
const WAITING: usize = 1024;

/// Sets the function that receives the lines of the log. It replaces the one that was set before.
///
/// Waits for a call of the old function that is running; the old user pointer is not used after that.
///
/// Without a function, lines go to standard error if the environment variable NBLOCK_LOG names a level
/// (error, warn, info, debug, trace). Lines that arrive faster than the function takes them are dropped, so
/// that logging never waits.
///
/// @param callback The function, which is called with every line up to the level; or NULL for none.
/// @param user A pointer that the function gets with every line. May be NULL.
/// @param level NBL_LOG_ERROR to NBL_LOG_TRACE; 0 is the default, NBL_LOG_INFO. Ignored if callback is NULL.
/// @retval NBL_OK Set.
/// @retval NBL_ERR_INVALID_ARGUMENT There is no such level.
/// @retval NBL_ERR_INVALID_OP Called from inside the callback.
/// @retval NBL_ERR_RESOURCES The thread that calls the function could not be started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nbl_log_set(callback: nbl_log_fn, user: *mut c_void, level: i32) -> nbl_status_t {
    guard(ptr::null_mut(), || {
        let level = match level {
            _ if callback.is_none() => Level::ERROR,
            NBL_LOG_ERROR => Level::ERROR,
            NBL_LOG_WARN => Level::WARN,
            0 | NBL_LOG_INFO => Level::INFO,
            NBL_LOG_DEBUG => Level::DEBUG,
            NBL_LOG_TRACE => Level::TRACE,
            _ => {
                return Err(Failure::invalid_argument(format!(
                    "level must be NBL_LOG_ERROR to NBL_LOG_TRACE, or 0 for the default (got {level})"
                )));
            }
        };
        SETTING.fetch_add(1, Ordering::AcqRel);
        let lines = lines()?;
        // Waits until a running callback has returned.
        let _calling = lines.calling.lock();
        USER.store(user, Ordering::Release);
        match callback {
            Some(callback) => {
                CALLBACK.store(callback as *mut c_void, Ordering::Release);
                log::set_sink(level, send);
            }
            None => {
                CALLBACK.store(ptr::null_mut(), Ordering::Release);
                log::clear_sink();
            }
        }
        Ok(NBL_OK)
    })
}

fn lines() -> Result<&'static Lines, Failure> {
    LINES.get_or_try_init(|_| {
        let (sender, receiver) = sync_channel(WAITING);
        let calling = std::sync::Arc::new(Mutex::default());
        let held_by_thread = std::sync::Arc::clone(&calling);
        let thread = std::thread::Builder::new().name("nblock-log".to_string());
        runtime::with_signals_blocked(|| thread.spawn(move || run(&receiver, &held_by_thread)))
            .map_err(|error| Failure::resources(&format!("the log's thread could not be started: {error}")))?;
        Ok(Lines { sender, calling })
    })
}

fn send(level: Level, line: &str) {
    let number = match level {
        Level::ERROR => NBL_LOG_ERROR,
        Level::WARN => NBL_LOG_WARN,
        Level::INFO => NBL_LOG_INFO,
        Level::DEBUG => NBL_LOG_DEBUG,
        Level::TRACE => NBL_LOG_TRACE,
    };
    let Ok(lines) = lines() else { return };
    let line = text::terminated(line);
    // If the queue is full, the callback is slow. The line is dropped, because logging must not wait.
    let _ = lines.sender.try_send((SETTING.load(Ordering::Acquire), number, line));
}

fn run(receiver: &Receiver<(u64, i32, CString)>, calling: &Mutex<()>) {
    callback::begin();
    while let Ok((setting, level, line)) = receiver.recv() {
        let _calling = calling.lock();
        let callback = CALLBACK.load(Ordering::Acquire);
        if callback.is_null() || setting != SETTING.load(Ordering::Acquire) {
            continue;
        }
        // SAFETY: only nbl_log_set stores here, and it stores an nbl_log_fn; it is called while
        // `calling` is held, which nbl_log_set needs to replace it.
        unsafe {
            let callback =
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i32, *const c_char, *mut c_void)>(callback);
            callback(level, line.as_ptr(), USER.load(Ordering::Acquire));
        }
    }
}
