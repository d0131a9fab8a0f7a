//! The `nblock` command: runs commands under a lock, and shows and breaks locks.

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
mod manual;
mod pattern;
mod ping;
mod run;
mod standard;
mod table;
mod watch;

use std::io::{self, Write as _};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ContextKind;
use nblock::client::Client;
use nblock::error::Error;
use nblock::options::ClientOptions;
use nblock::runtime;

use self::arguments::{Arguments, Command};
use self::failure::{Failure, status};

fn main() -> ExitCode {
    let given: Vec<_> = std::env::args_os().collect();
    arguments_memory::hide_passwords();
    let arguments = match Arguments::try_parse_from(&given) {
        Ok(arguments) => arguments,
        Err(error) => return ExitCode::from(refuse(&given, error)),
    };
    nblock::log::from_environment();
    nblock::log::errors_at_least();
    let url = arguments.url.as_deref();
    if !matches!(arguments.command, Command::Run(_)) {
        // `nblock list | head` ends quietly, as other commands do. Rust ignores SIGPIPE at start.
        // SAFETY: the default action, set before there are threads.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    let done = match arguments.command {
        Command::Run(run) => run::run(url, run),
        Command::List(list) => inspect::list(url, &list),
        Command::Watch(watch) => watch::watch(url, &watch),
        Command::Show(show) => inspect::show(url, &show),
        Command::Break(breaking) => breaking::break_locks(url, &breaking),
        Command::Ping(ping) => ping::ping(url, &ping),
        Command::Completions { shell } => manual::completions(shell),
        Command::Manual => manual::manual(),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            say!("{failure}");
            ExitCode::from(failure.status())
        }
    }
}

/// Prints what is wrong with the command line, or the help that it asks for; the exit status.
fn refuse(given: &[std::ffi::OsString], mut error: clap::Error) -> u8 {
    let says = |word: &str| given.iter().any(|given| given == word);
    let unknown = error.kind() == clap::error::ErrorKind::UnknownArgument;
    if unknown && says("run") {
        // What clap suggests does not work where the command comes after `--`.
        error.remove(ContextKind::Suggested);
    }
    let printed = error.print().and_then(|()| io::stdout().flush());
    if error.use_stderr() {
        if unknown && says("run") && !says("--") {
            say!("the command comes after `--`: nblock run KEY -- COMMAND");
        } else if unknown && says("run") {
            say!("a key that begins with `-` is given as --key=KEY");
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

/// Opens the store for a command that only looks, or breaks.
fn open(url: Option<&str>) -> Result<Client, Failure> {
    let options = ClientOptions { app: "nblock".to_string(), ..ClientOptions::default() };
    Ok(runtime::wait(Client::open(url, options))?)
}

/// The key of an argument.
fn key(argument: &std::ffi::OsStr) -> Result<nblock::key::Key, Error> {
    nblock::key::Key::new(argument.as_encoded_bytes())
}
