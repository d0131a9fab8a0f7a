//! The `nblock` command: runs commands under a lock, and shows and breaks locks.

/// Tells people something, on standard error.
macro_rules! say {
    ($($what:tt)*) => { $crate::failure::say(format_args!($($what)*)) };
}

mod arguments;
mod arguments_memory;
mod breaking;
mod duration;
mod failure;
mod inspect;
mod manual;
mod ping;
mod run;
mod schema;
mod table;
mod watch;

use std::process::ExitCode;

use clap::Parser;
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
        Err(error) => {
            // Nothing to be done where even this cannot be written.
            let _ = error.print();
            let says = |word: &str| given.iter().any(|given| given == word);
            if error.kind() == clap::error::ErrorKind::UnknownArgument && says("run") && !says("--") {
                say!("the command comes after `--`: nblock run KEY -- COMMAND");
            }
            return ExitCode::from(if error.use_stderr() { status::USAGE } else { 0 });
        }
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
        Command::Watch => watch::watch(url),
        Command::Show(show) => inspect::show(url, &show),
        Command::Break(breaking) => breaking::break_locks(url, &breaking),
        Command::Ping(ping) => ping::ping(url, &ping),
        Command::Schema(schema) => schema::schema(&schema),
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

/// Opens the store for a command that only looks, or breaks.
fn open(url: Option<&str>) -> Result<Client, Failure> {
    let options = ClientOptions { app: "nblock".to_string(), ..ClientOptions::default() };
    Ok(runtime::wait(Client::open(url, options))?)
}

/// The key of an argument.
fn key(argument: &std::ffi::OsStr) -> Result<nblock::key::Key, Error> {
    nblock::key::Key::new(argument.as_encoded_bytes())
}
