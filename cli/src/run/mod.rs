//! `nblock run`: a command under a lock.
//!
//! There are three processes: this one, which holds and renews the lock; the command, in a process
//! group of its own; and the [guard], which is in that group and kills it when this process is gone or
//! late. The order of what happens matters:
//!
//! 1. The signals are blocked, before there is any thread.
//! 2. The lock is granted. No thread is started for a lock that is free.
//! 3. The command's process is started. It makes a group of its own, starts the guard in it, which has its
//!    deadline by then, and only after that becomes the command. At no moment does that run unguarded.
//! 4. When the lease needs renewing for the first time, the library's threads are started.

mod child;
mod guard;
mod signals;
mod stack;
mod supervise;
mod terminal;
mod timer;
mod waiting;

use std::path::Path;

use nblock::client::Client;
use nblock::clock::Boottime;
use nblock::error::{Error, ErrorKind};
use nblock::key::Key;
use nblock::lock::Lock;
use nblock::options::{ClientOptions, LockOptions};
use nblock::record::Owner;
use nblock::store::Answer;

use self::child::{Ending, NotStarted, Program};
use self::signals::{Signals, die, die_with_group};
use self::supervise::{Supervised, Supervisor};
use self::terminal::Terminal;
use self::waiting::{Interrupted, answer};
use crate::arguments::{OnLost, Run};
use crate::failure::{Failure, status};
use crate::table;

pub fn run(url: Option<&str>, run: Run) -> Result<u8, Failure> {
    let key = crate::key(run.key())?;
    let signals = Signals::take().map_err(|error| Failure::system("could not read signals", &error))?;
    let mut terminal = Terminal::open();
    match under_lock(url, &run, &key, &signals, &mut terminal) {
        Ok(status) => Ok(status),
        Err(Stopped::Failed(failure)) => Err(failure),
        // A shell that waits for us at its terminal wants to see what ended us.
        Err(Stopped::By(signal)) if terminal.is_ours() => die(signal),
        // The script or loop that runs us was meant as well.
        Err(Stopped::Typed(signal)) if terminal.is_ours() => die_with_group(signal),
        Err(Stopped::By(signal) | Stopped::Typed(signal)) => Ok(128 + signal as u8),
    }
}

/// Why there is no exit status of the command's.
enum Stopped {
    Failed(Failure),
    /// By a signal to us.
    By(libc::c_int),
    /// By a signal that was typed at the terminal, and so reached the command only.
    Typed(libc::c_int),
}

impl<E: Into<Failure>> From<E> for Stopped {
    fn from(error: E) -> Stopped {
        Stopped::Failed(error.into())
    }
}

fn under_lock(
    url: Option<&str>,
    run: &Run,
    key: &Key,
    signals: &Signals,
    terminal: &mut Terminal,
) -> Result<u8, Stopped> {
    let options = ClientOptions { app: app_name(run), ..ClientOptions::default() };
    let client = answer(signals, Client::open(url, options)).map_err(stopped)??;
    if client.location().is_ok_and(|location| location.starts_with(nblock::stores::memory::LOCATION)) {
        // The command runs, and no error shows that another one may run beside it.
        say!("the store memory: is inside this process, and excludes no other command: name another one");
    }
    let status = acquire_and_run(&client, run, key, signals, terminal);
    // A request that was given up is still being cleaned up, if the store is slow: the next one should
    // not find it there. A user who cannot wait for that sends a signal.
    let _ = answer(signals, client.close(Boottime::now() + client.options().op_timeout));
    // What else there is of it ends with this process, which the kernel takes apart faster.
    std::mem::forget(client);
    status
}

fn acquire_and_run(
    client: &Client,
    run: &Run,
    key: &Key,
    signals: &Signals,
    terminal: &mut Terminal,
) -> Result<u8, Stopped> {
    let wanted = LockOptions { expire: run.expire, fence: Some(run.fence), ..LockOptions::default() };
    let lock = client.lock(key.clone(), wanted)?;
    let patience = LockOptions { timeout: run.timeout(), ..LockOptions::default() };
    if !answer(signals, lock.lock(patience)).map_err(stopped)?? {
        // A status that means success asks for silence: cron sends a mail for each line.
        if run.conflict_exit_code != 0 {
            say!("{}", held_by(signals, client, key));
        }
        return Ok(run.conflict_exit_code);
    }
    let supervised = command(run, key, &lock, signals, terminal);
    let unlocked = match supervise::gone(lock.state()) {
        true => Err(Error::new(ErrorKind::Lost, "")),
        // Where the store does not answer, a signal ends the waiting for it.
        false => answer(signals, lock.unlock()).unwrap_or(Ok(())),
    };
    let supervised = supervised?;
    match unlocked {
        Err(error) if error.kind() == ErrorKind::Lost && !supervised.lost => {
            say!("{} was lost while the command ran: another process may have held it", key.quoted());
            if run.on_lost == OnLost::Kill {
                return Ok(status::LOST);
            }
        }
        Err(error) if error.kind() != ErrorKind::Lost => {
            say!("{} was not released, others get it when its lease ends: {error}", key.quoted())
        }
        _ => {}
    }
    if supervised.killed {
        return Ok(status::LOST);
    }
    match supervised.ending {
        Ending::Exited(status) => Ok(status),
        // A ^C that only the command got, since it had the terminal.
        Ending::Killed(signal @ (libc::SIGINT | libc::SIGQUIT)) if supervised.had_terminal => {
            Err(Stopped::Typed(signal))
        }
        Ending::Killed(signal) if supervised.passed_on == Some(signal) => Err(Stopped::By(signal)),
        Ending::Killed(signal) => Ok(128 + signal as u8),
    }
}

fn stopped(Interrupted(signal): Interrupted) -> Stopped {
    Stopped::By(signal)
}

/// Runs the command to its end.
fn command(
    run: &Run,
    key: &Key,
    lock: &Lock,
    signals: &Signals,
    terminal: &mut Terminal,
) -> Result<Supervised, Failure> {
    let mut environment = vec![("NBLOCK_KEY", key.as_str().to_string())];
    // Known, or else not asked for.
    match lock.fence() {
        Answer::Now(Ok(fence)) => environment.push(("NBLOCK_FENCE", fence.to_string())),
        Answer::Now(Err(error)) => return Err(error.into()),
        Answer::Later(_) => {}
    }
    if terminal.is_ours() {
        signals.let_the_command_ask_for_the_terminal();
    }
    let shown = run.command[0].to_string_lossy();
    let program = Program::new(&run.command, &environment).map_err(|error| Failure::system(&shown, &error))?;
    let supervisor = Supervisor::start(run, lock, signals, terminal, &program).map_err(|why| match why {
        NotStarted::NoProcess(error) => Failure::system(&shown, &error),
        NotStarted::NotGuarded(error) => Failure::system("could not guard the command", &error),
        NotStarted::NotRun(error) => {
            let status = match error.raw_os_error() {
                Some(libc::ENOENT) => status::NO_SUCH_COMMAND,
                _ => status::CANNOT_RUN,
            };
            let error = error.to_string();
            // Rust's text has the number behind it, which says nothing more.
            let error = error.split(" (os error").next().unwrap_or(&error);
            let missing = status == status::NO_SUCH_COMMAND;
            let message = if missing && shown.contains('/') && Path::new(&run.command[0]).exists() {
                format!("could not run {shown}: the interpreter in its first line does not exist")
            } else if missing && shown.contains(char::is_whitespace) {
                format!("could not run {shown:?}: {error}. For a command line of the shell: -- sh -c '...'")
            } else {
                format!("could not run {shown}: {error}")
            };
            Failure::new(status, message)
        }
    })?;
    Ok(supervisor.run())
}

/// What a list of locks shows of us: the command's name, without its arguments, which may be
/// secret.
fn app_name(run: &Run) -> String {
    let name = Path::new(&run.command[0]).file_name().unwrap_or_default().to_string_lossy();
    let mut end = name.len().min(ClientOptions::MAX_APP_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_string()
}

/// Whether the holder is an `nblock run` of the same key that started us, and so waits for us. A process id means
/// something in one boot of one host, and in one container, which has a host name of its own.
fn runs_under(key: &Key, holder: &Owner) -> bool {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let is_here = |file, value: &str| read(file).trim_end() == value;
    std::env::var_os("NBLOCK_KEY").is_some_and(|outer| outer == key.as_str())
        && is_here("/proc/sys/kernel/random/boot_id", &holder.boot_id)
        && is_here("/proc/sys/kernel/hostname", &holder.host)
        && std::iter::successors(Some(std::process::id()), |process| {
            // The name in parentheses may contain anything; the state and the parent follow it.
            let parent = read(&format!("/proc/{process}/stat")).rsplit_once(')')?.1.split_whitespace().nth(1)?.parse();
            parent.ok().filter(|parent| *parent > 0)
        })
        .any(|process| process == holder.pid)
}

/// The holder of the lock that we did not get, as far as the store says.
fn held_by(signals: &Signals, client: &Client, key: &Key) -> String {
    let held = answer(signals, client.find(key)).ok().and_then(Result::ok).flatten();
    match held.as_ref().map(|record| (record, &record.owner)) {
        Some((record, Some(owner))) if !record.lease.expired() => {
            let parent = match runs_under(key, owner) {
                true => ", the nblock run that started this command",
                false => "",
            };
            format!(
                "{} is held by {} ({}){parent}, and was not granted in time",
                key.quoted(),
                table::holder(owner),
                table::lease(record.lease)
            )
        }
        Some((record, None)) if record.is_foreign() && !record.lease.expired() => {
            let lease = table::lease(record.lease);
            format!("{} is held by another program ({lease}), and was not granted in time", key.quoted())
        }
        _ => format!("{} was not granted in time; its holder is not known", key.quoted()),
    }
}
