//! The `nblock` command: runs commands under a lock, and shows and breaks locks.
//!
//! It has a `main` of C's and not of Rust's, whose start-up reads /proc/self/maps and more, for a message
//! about stack overflows: a tenth of what it takes to start.

#![cfg_attr(not(test), no_main)]

/// Tells people something, on standard error.
macro_rules! say {
    ($($what:tt)*) => { $crate::failure::say(format_args!($($what)*)) };
}

mod arguments;
mod arguments_memory;
mod breaking;
mod display;
mod duration;
mod failure;
mod inspect;
mod libraries;
mod manual;
mod pattern;
mod ping;
mod run;
mod schema;
mod standard;
mod table;
mod watch;

use std::ffi::OsString;
use std::io::{self, Write as _};

use clap::error::{ContextKind, ContextValue};
use nblock::client::Client;
use nblock::error::Error;
use nblock::options::ClientOptions;
use nblock::sys::runtime;

use self::arguments::{Arguments, Command};
use self::arguments_memory::ArgumentsMemory;
use self::failure::{Failure, status};

/// The C library's `main`.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(count: std::ffi::c_int, arguments: *mut *mut std::ffi::c_char) -> std::ffi::c_int {
    // SAFETY: what the C library gives.
    let arguments = unsafe { ArgumentsMemory::new(count, arguments) };
    // What it was has been said.
    let status = std::panic::catch_unwind(|| start(arguments)).unwrap_or(status::INTERNAL);
    // Everything was written. Nothing needs to be taken apart: the kernel does it faster.
    // SAFETY: ends the process.
    unsafe { libc::_exit(status.into()) }
}

/// The tests' own takes its place.
#[cfg(test)]
fn main() {
    // SAFETY: there are no arguments.
    start(unsafe { ArgumentsMemory::new(0, std::ptr::null_mut()) });
}

/// Does what the arguments say; the exit status.
fn start(memory: ArgumentsMemory) -> u8 {
    let given = memory.copied();
    memory.hide_passwords();
    if let Err(error) = standard::fill() {
        say!("/dev/null could not be opened: {error}");
        return status::SYSTEM;
    }
    // SAFETY: ignored before there are threads, so that writing to a pipe that nobody reads is an error.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let arguments = match Arguments::of(&given) {
        Ok(arguments) => arguments,
        Err(error) => return refuse(&given, error),
    };
    nblock::log::from_environment();
    nblock::log::errors_at_least();
    let url = arguments.url.as_deref();
    if !matches!(arguments.command, Command::Run(_)) {
        end_with_the_pipe();
    }
    let done = match arguments.command {
        Command::Run(run) => run::run(url, run),
        Command::List(list) => inspect::list(url, &list),
        Command::Watch(watch) => watch::watch(url, &watch),
        Command::Show(show) => inspect::show(url, &show),
        Command::Break(breaking) => breaking::break_locks(url, &breaking),
        Command::Ping(ping) => ping::ping(url, &ping),
        Command::Schema(schema) => schema::schema(&schema),
        Command::Completions { shell } => manual::completions(shell),
        Command::Manual => manual::manual(),
    };
    match done {
        Ok(status) => status,
        Err(failure) => {
            say!("{failure}");
            failure.status()
        }
    }
}

/// `nblock list | head` ends quietly, as other commands do. To be called before there are threads.
fn end_with_the_pipe() {
    // SAFETY: the default action.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Prints what is wrong with the command line, or the help that it asks for; the exit status.
fn refuse(given: &[OsString], mut error: clap::Error) -> u8 {
    end_with_the_pipe();
    let says = |word: &str| given.iter().any(|given| given == word);
    let unknown = error.kind() == clap::error::ErrorKind::UnknownArgument;
    if unknown && says("run") {
        // What clap suggests does not work where the command comes after `--`.
        error.remove(ContextKind::Suggested);
    }
    let printed = error.print().and_then(|()| io::stdout().flush());
    if error.use_stderr() {
        if unknown && says("run") {
            let unexpected = match error.get(ContextKind::InvalidArg) {
                Some(ContextValue::String(unexpected)) => unexpected.as_str(),
                _ => "",
            };
            say!("{}", hint(given, unexpected));
        }
        // Nothing to be done where even this cannot be written.
        return status::USAGE;
    }
    match failure::written(printed) {
        Ok(()) => 0,
        Err(failure) => {
            say!("{failure}");
            failure.status()
        }
    }
}

/// What to write instead of an argument that `nblock run` does not take.
fn hint(given: &[OsString], unexpected: &str) -> String {
    const OF_FLOCK: [&str; 18] = [
        "-n",
        "--nb",
        "--nonblock",
        "-w",
        "-E",
        "-c",
        "--command",
        "-x",
        "-e",
        "--exclusive",
        "-s",
        "--shared",
        "-u",
        "--unlock",
        "-o",
        "--close",
        "-F",
        "--no-fork",
    ];
    let dashes = given.iter().position(|given| given == "--");
    let options = &given[..dashes.unwrap_or(given.len())];
    // flock's --wait takes a number. The number is the key then, and the key is what is not expected.
    let wait = options.iter().position(|given| given == "--wait").and_then(|wait| options.get(wait + 1)?.to_str());
    if OF_FLOCK.contains(&unexpected.split('=').next().unwrap_or_default()) {
        "flock's -n is --no-wait, -w is --timeout, -E is --conflict-exit-code; for -c: nblock run KEY -- sh -c '...'"
            .to_string()
    } else if let Some(seconds) = wait.filter(|next| duration::parse(next).is_ok()) {
        format!("--wait waits forever, and takes no number: write --timeout {seconds}")
    } else if dashes.is_none() {
        "the command comes after `--`: nblock run KEY -- COMMAND".to_string()
    } else if unexpected.starts_with('-') {
        "a key that begins with `-` is given as --key=KEY".to_string()
    } else {
        "one key comes before `--`: put a key with spaces in it between quotes".to_string()
    }
}

/// Opens the store for a command that only looks, or breaks.
fn open(url: Option<&str>) -> Result<Client, Failure> {
    let options = ClientOptions { app: "nblock".to_string(), ..ClientOptions::default() };
    Ok(runtime::wait(Client::open(url, options))?)
}

/// The key of an argument.
fn key(argument: &std::ffi::OsStr) -> Result<nblock::key::Key, Error> {
    nblock::key::Key::new(argument.as_encoded_bytes())
}
