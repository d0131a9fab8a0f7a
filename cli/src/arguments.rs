//! What the command line may say. Also the source of the man page and of the shells' completions.

use std::ffi::{OsStr, OsString};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nblock::options::Timeout;

use crate::duration;

#[derive(Parser)]
#[command(
    name = "nblock",
    version,
    about = "Locks for commands, on one machine or many",
    long_about = "Locks for commands, on one machine or many.\n\n\
        Runs commands under a lock, and shows, watches and breaks locks. A lock is a lease: it is renewed while \
        its command runs, and ends by itself if its holder dies. If it cannot be renewed, the command is killed \
        before the lease ends. If it is broken, the command is killed when nblock notices that.",
    after_help = EXAMPLES,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Arguments {
    /// Where the locks are: embedded:, embedded:/dir, redis://host, postgres://user@host/db, rethinkdb://user@host/db
    ///
    /// Without it: $NBLOCK_URL, else NoBrainer's environment ($RETHINKDB_URL and so on), else
    /// /etc/nblock.conf, else embedded:, which is this machine.
    #[arg(long, global = true, value_name = "URL", display_order = 900)]
    pub url: Option<String>,

    #[command(subcommand)]
    pub command: Command,
}

/// As [`Arguments`], of `nblock run` alone: what is not defined need not be made, which takes a third of
/// the time that reading the arguments takes.
#[derive(Parser)]
#[command(name = "nblock", disable_help_subcommand = true)]
struct RunArguments {
    #[arg(long, global = true)]
    url: Option<String>,

    #[command(subcommand)]
    command: RunCommand,
}

#[derive(Subcommand)]
enum RunCommand {
    Run(Run),
}

impl Arguments {
    /// The arguments of this process, the command's name first.
    pub fn of(given: &[OsString]) -> Result<Arguments, clap::Error> {
        if let Some(run) = Run::without_options(given) {
            return Ok(Arguments { url: None, command: Command::Run(run) });
        }
        if given.get(1).is_some_and(|first| first == "run")
            && let Ok(RunArguments { url, command: RunCommand::Run(run) }) = RunArguments::try_parse_from(given)
        {
            return Ok(Arguments { url, command: Command::Run(run) });
        }
        // What is wrong with them, or help, is said by the whole.
        Arguments::try_parse_from(given)
    }
}

#[derive(Subcommand)]
pub enum Command {
    Run(Run),
    List(List),
    Watch(Watch),
    Show(Show),
    Break(Break),
    Ping(Ping),
    Schema(Schema),
    /// Print completions for a shell
    #[command(hide = true)]
    Completions {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the man page
    #[command(hide = true)]
    Manual,
}

/// Run a command under a lock
///
/// Waits for the lock, runs the command, renews the lock while the command runs, and releases it when the command has
/// ended.
///
/// The command runs in its own process group, which gets the terminal if there is one. Signals that nblock gets are
/// passed on. If nblock itself is killed, even with SIGKILL, the command and its children are killed.
///
/// The command's environment has NBLOCK_KEY, and NBLOCK_FENCE where there is a fence.
#[derive(Args, Debug, PartialEq, Eq)]
#[command(after_help = RUN_NOTES, override_usage = "nblock run [OPTIONS] <KEY> -- <COMMAND>...")]
pub struct Run {
    /// Length of the lease: how long others wait at most if this machine dies or nblock is killed [default: 60]
    ///
    /// Seconds, or a number with a unit: 250ms, 90s, 5m, 2h, 1d. From 1 ms to 366 days. While the command runs, the lease
    /// is renewed after each third of this.
    #[arg(long, value_name = "S", value_parser = duration::parse_expire, allow_negative_numbers = true)]
    pub expire: Option<Duration>,

    /// How long to wait for the lock; 0 tries once [default: 10]
    ///
    /// Seconds, or a number with a unit, as in --expire.
    #[arg(long, value_name = "S", value_parser = duration::parse, allow_negative_numbers = true)]
    timeout: Option<Duration>,

    /// Do not wait: try once
    #[arg(long, conflicts_with_all = ["timeout", "wait"])]
    no_wait: bool,

    /// Wait for the lock forever
    #[arg(long, conflicts_with = "timeout")]
    wait: bool,

    /// What to do when the lock is lost, or cannot be renewed
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = ON_LOST)]
    pub on_lost: OnLost,

    /// Set NBLOCK_FENCE, also on RethinkDB
    ///
    /// A number that grows with every grant of the key. The resource that the command writes to can refuse a number
    /// that is smaller than the largest one it has seen. RethinkDB gives one only with this option; the other stores
    /// always do.
    #[arg(long)]
    pub fence: bool,

    /// Exit status if the lock was not granted in time
    #[arg(long, value_name = "N", default_value_t = CONFLICT_EXIT_CODE)]
    pub conflict_exit_code: u8,

    /// The name that is locked: 1 byte to 1 MiB of UTF-8
    #[arg(value_name = "KEY", required_unless_present = "dashed_key", conflicts_with = "dashed_key")]
    key: Option<OsString>,

    /// The key, if it begins with `-`: --key=KEY
    #[arg(long = "key", value_name = "KEY", allow_hyphen_values = true)]
    dashed_key: Option<OsString>,

    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

const ON_LOST: OnLost = OnLost::Kill;
const CONFLICT_EXIT_CODE: u8 = crate::failure::status::UNAVAILABLE;

impl Run {
    /// What `nblock run KEY -- COMMAND...` says, if that is what was given: most of what it takes to read arguments is to
    /// define the options that could be there.
    fn without_options(given: &[OsString]) -> Option<Run> {
        let [_, run, key, dashes, command @ ..] = given else { return None };
        if run != "run" || key.as_encoded_bytes().starts_with(b"-") || dashes != "--" || command.is_empty() {
            return None;
        }
        Some(Run {
            expire: None,
            timeout: None,
            no_wait: false,
            wait: false,
            on_lost: ON_LOST,
            fence: false,
            conflict_exit_code: CONFLICT_EXIT_CODE,
            key: Some(key.clone()),
            dashed_key: None,
            command: command.to_vec(),
        })
    }

    pub fn key(&self) -> &OsStr {
        // One of them is required.
        self.key.as_deref().or(self.dashed_key.as_deref()).unwrap_or_default()
    }

    /// How long to wait; `None` where nothing was said.
    pub fn timeout(&self) -> Option<Timeout> {
        match (self.no_wait, self.wait, self.timeout) {
            (true, ..) => Some(Timeout::NoWait),
            (_, true, _) => Some(Timeout::Forever),
            (.., Some(timeout)) if timeout.is_zero() => Some(Timeout::NoWait),
            (.., timeout) => timeout.map(Timeout::After),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnLost {
    /// End the command: SIGTERM before the lease ends, then SIGKILL; SIGKILL at once if the lock is lost already
    Kill,
    /// Write a line to standard error, and let the command continue
    Warn,
}

/// Which locks, and in which order
#[derive(Args)]
pub struct Selection {
    /// Only keys that begin with PATTERN; if it contains * or ?, only keys that match it as a whole
    ///
    /// * stands for any text and ? for one character; a backslash before one of them means the character itself.
    #[arg(value_name = "PATTERN")]
    pub pattern: Option<OsString>,

    /// The order of the locks
    #[arg(long, value_name = "ORDER", value_enum, default_value_t = Order::Key)]
    pub sort: Order,

    /// Reverse the order
    #[arg(long)]
    pub reverse: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// By key
    Key,
    /// Leases that have ended, or will end first, come first
    Lease,
    /// Locks that have been held longest come first
    Held,
    /// By host, app and process
    Holder,
}

/// Show the locks live
///
/// A table that is drawn again every second; a line for each change if standard output is not a terminal.
#[derive(Args)]
pub struct Watch {
    #[command(flatten)]
    pub selection: Selection,
}

/// List the locks
///
/// With the holder of each, and how long it has been held. Tokens are never shown.
#[derive(Args)]
pub struct List {
    #[command(flatten)]
    pub selection: Selection,

    /// Only those whose lease has ended
    #[arg(long)]
    pub expired: bool,

    /// As a JSON array
    #[arg(long)]
    pub json: bool,
}

/// Show one lock
///
/// Exits with status 1 if there is no record of it.
#[derive(Args)]
pub struct Show {
    /// As a JSON object
    #[arg(long)]
    pub json: bool,

    /// The name that is locked
    pub key: OsString,
}

/// Delete the record of a lock by force
///
/// Another process can then have the lock at once. Only the hold that was read is broken: if it ends meanwhile, nothing
/// is broken, and the exit status is 1. The holder learns of it when it next renews the lock, and may work until then.
///
/// Between nblock show and nblock break, the lock may have passed to another holder. The --if options say which hold is
/// meant, with values that nblock show prints. If several are given, all of them must match.
#[derive(Args)]
#[command(override_usage = "nblock break [OPTIONS] <KEY>\n       nblock break [OPTIONS] --expired [--older-than <S>]")]
pub struct Break {
    /// The name that is locked
    #[arg(required_unless_present = "expired", conflicts_with = "expired")]
    pub key: Option<OsString>,

    /// Break all locks whose lease has ended
    #[arg(long)]
    pub expired: bool,

    /// Of those, only leases that ended at least this long ago
    ///
    /// Seconds, or a number with a unit: 250ms, 90s, 5m, 2h, 1d.
    #[arg(long, value_name = "S", value_parser = duration::parse, requires = "expired", conflicts_with = "key")]
    pub older_than: Option<Duration>,

    /// Only the hold that has this fence
    #[arg(long, value_name = "N", conflicts_with = "expired")]
    pub if_fence: Option<u64>,

    /// Only a hold of this process
    #[arg(long, value_name = "HOST:PID", conflicts_with = "expired")]
    pub if_owner: Option<String>,

    /// Only this exact state of the record
    ///
    /// It changes with every renewal, at a third of the lease.
    #[arg(long, value_name = "V", conflicts_with = "expired")]
    pub if_version: Option<String>,

    /// Break it even if nblock did not write it
    ///
    /// In Redis, any string at the key counts as a held lock: another library's lock, or perhaps a program's data.
    /// Without this option it is not deleted.
    #[arg(long, conflicts_with = "expired")]
    pub foreign: bool,
}

/// Show which store is used and why, and whether it answers
///
/// Also shows the store's version, the fastest of five round trips, the difference between its clock and this machine's
/// where that can be measured, and warnings about settings that endanger locks.
#[derive(Args)]
pub struct Ping {
    /// As a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Print the SQL that creates the table of locks
///
/// Also prints the grants for an account that may not create tables. An account that may create tables does not need
/// this: the table is created when it is first needed.
#[derive(Args)]
pub struct Schema {
    /// The kind of server
    #[arg(value_enum)]
    pub engine: Engine,

    /// The table, as in the store URL's table=: table or schema.table [default: public.nblock_locks]
    #[arg(long, value_name = "TABLE")]
    pub table: Option<String>,

    /// The account that the programs use
    #[arg(long, value_name = "USER", default_value = "app")]
    pub user: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    Postgres,
}

const EXAMPLES: &str = "\
Examples:
  nblock run jobs:report -- ./report.sh            one at a time; the others wait, 10 s at most
  nblock run --no-wait jobs:sync -- rsync -a a b   skipped while another one runs
  nblock list                                      who holds what
  nblock watch --sort lease 'jobs:*'               the same, live: keys that begin with jobs:, sorted by lease
  nblock break jobs:report                         free the lock, even if its holder still works
  nblock ping                                      which store is used, and whether it answers";

const RUN_NOTES: &str = "\
Examples:
  nblock run jobs:report -- ./report.sh
  nblock run --no-wait --conflict-exit-code 0 cron:sync -- rsync -a a b
  nblock run --wait --expire 5m deploy -- make deploy
  nblock run jobs:x -- sh -c 'echo \"$NBLOCK_KEY $NBLOCK_FENCE\"'

Exit status:
  the command's own; 128+N if signal N ended it; 126 if it cannot be run, 127 if it is not found
  64  the command line is wrong                 69  the store could not be reached, or did not answer
  75  the lock was not granted in time          76  the lock was lost, and the command killed
  65  the store contains something damaged, or refused the request
  70  a bug in nblock                           71  no processes, memory, descriptors or disk space left
  74  standard output could not be written      77  credentials or permission refused";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_options_reads_the_same_without_their_definitions() {
        let given = |line: &[&str]| line.iter().map(OsString::from).collect::<Vec<_>>();
        for line in [
            &["nblock", "run", "k", "--", "true"][..],
            &["nblock", "run", "jobs:report", "--", "sh", "-c", "exit 3", "--", "--wait"],
            &["nblock", "run", "", "--", "--help"],
            &["nblock", "run", "run", "--", "-"],
        ] {
            let line = given(line);
            let RunArguments { url, command: RunCommand::Run(run) } = RunArguments::try_parse_from(&line).unwrap();
            assert_eq!((url, Some(run)), (None, Run::without_options(&line)), "{line:?}");
        }
        for line in [
            &["nblock", "run", "k", "--"][..],
            &["nblock", "run", "--", "true", "false"],
            &["nblock", "run", "--wait", "k", "--", "true"],
            &["nblock", "run", "--help", "--", "true"],
            &["nblock", "run", "k", "true", "--", "true"],
            &["nblock", "show", "k", "--", "true"],
            &["nblock", "--url", "memory:", "run", "k", "--", "true"],
        ] {
            assert_eq!(Run::without_options(&given(line)), None, "{line:?}");
        }
    }
}
