//! The library's log, as lines of text: to standard error, or to a callback.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};

/// Takes one line, without the line break. Called on the thread that logs, so it must not wait.
pub type Sink = fn(Level, &str);

static SINK: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());
/// 0: nothing; 1: errors; up to 5: traces.
static VERBOSITY: AtomicU8 = AtomicU8::new(0);

/// Sends log lines up to a level to `sink` from now on, instead of an earlier sink.
///
/// If the program has its own tracing subscriber, that one gets everything instead.
pub fn set_sink(level: Level, sink: Sink) {
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    SINK.store(sink as *mut (), Ordering::Release);
    VERBOSITY.store(verbosity(level), Ordering::Release);
    if !INSTALLED.swap(true, Ordering::AcqRel) {
        // Fails if a Rust program has its own subscriber, which then gets the events.
        let _ = tracing::subscriber::set_global_default(Lines);
    }
}

/// Stops logging.
pub fn clear_sink() {
    VERBOSITY.store(0, Ordering::Release);
}

/// A level by its name, as in `NBLOCK_LOG`: error, warn, info, debug or trace.
pub fn level(name: &str) -> Option<Level> {
    Some(match name {
        "error" => Level::ERROR,
        "warn" => Level::WARN,
        "info" => Level::INFO,
        "debug" => Level::DEBUG,
        "trace" => Level::TRACE,
        _ => return None,
    })
}

/// Logs to standard error if `NBLOCK_LOG` names a level and no sink was set.
pub fn from_environment() {
    static READ: AtomicBool = AtomicBool::new(false);
    if READ.swap(true, Ordering::AcqRel) || crate::sys::process::is_privileged() {
        return;
    }
    let Ok(name) = std::env::var("NBLOCK_LOG") else { return };
    match level(&name) {
        Some(level) if SINK.load(Ordering::Acquire).is_null() => set_sink(level, to_standard_error),
        Some(_) => {}
        None if name.is_empty() => {}
        None => to_standard_error(
            Level::WARN,
            &format!(
                "NBLOCK_LOG must be error, warn, info, debug or trace (got \
                 {name:?})"
            ),
        ),
    }
}

/// Logs errors to standard error unless a sink was set: for a program that people run interactively.
pub fn errors_at_least() {
    if SINK.load(Ordering::Acquire).is_null() {
        set_sink(Level::ERROR, to_standard_error);
    }
}

/// One line on standard error.
pub fn to_standard_error(level: Level, line: &str) {
    let line = format!("nblock: {}: {line}\n", level.as_str().to_ascii_lowercase());
    // Not through `std::io::stderr`: another thread may have held its lock when this process was forked. A failed write
    // is ignored.
    // SAFETY: writes bytes of `line`.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}

fn verbosity(level: Level) -> u8 {
    match level {
        Level::ERROR => 1,
        Level::WARN => 2,
        Level::INFO => 3,
        Level::DEBUG => 4,
        Level::TRACE => 5,
    }
}

/// A subscriber that writes events as lines. The library uses no spans.
struct Lines;

impl Subscriber for Lines {
    /// Not cached, because the level may change at any moment.
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        verbosity(*metadata.level()) <= VERBOSITY.load(Ordering::Acquire) && metadata.target().starts_with("nblock")
    }

    fn event(&self, event: &Event<'_>) {
        let sink = SINK.load(Ordering::Acquire);
        if sink.is_null() || !self.enabled(event.metadata()) {
            return;
        }
        // SAFETY: only `set_sink` stores here, and it stores a Sink.
        let sink = unsafe { std::mem::transmute::<*mut (), Sink>(sink) };
        let mut line = Line(String::new());
        event.record(&mut line);
        sink(*event.metadata().level(), &line.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
