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
        its command runs, runs out when its holder dies, and a command that loses its lock is killed before \
        anybody else can have it.",
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
/// Waits for the lock, runs the command while it holds it, renewing it all the while, and gives it back when the
/// command has ended.
///
/// The command runs in a process group of its own, which has the terminal where there is one. Signals that nblock
/// gets are passed on. When nblock itself is killed, even with SIGKILL, the command is killed with its children.
///
/// The command's environment has NBLOCK_KEY, and NBLOCK_FENCE where there is a fence.
#[derive(Args, Debug, PartialEq, Eq)]
#[command(after_help = RUN_NOTES, override_usage = "nblock run [OPTIONS] <KEY> -- <COMMAND>...")]
pub struct Run {
    /// Length of the lease: what others wait at most when this machine dies [default: 60]
    ///
    /// Seconds, or a number with a unit: 250ms, 90s, 5m, 2h, 1d. From 1 ms to 366 days. It is renewed at a third.
    #[arg(long, value_name = "S", value_parser = duration::parse_expire, allow_negative_numbers = true)]
    pub expire: Option<Duration>,

    /// How long to wait for the lock [default: 10]
    #[arg(long, value_name = "S", value_parser = duration::parse, allow_negative_numbers = true)]
    timeout: Option<Duration>,

    /// Try once
    #[arg(long, conflicts_with_all = ["timeout", "wait"])]
    no_wait: bool,

    /// Wait for ever
    #[arg(long, conflicts_with = "timeout")]
    wait: bool,

    /// What to do when the lock is lost, or cannot be renewed
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = ON_LOST)]
    pub on_lost: OnLost,

    /// Have a fence in NBLOCK_FENCE, from any store
    ///
    /// A number that grows with every grant of the key, for what the command writes to to check. The embedded store
    /// gives one anyway.
    #[arg(long)]
    pub fence: bool,

    /// Exit status for a lock that could not be had in time
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
    /// Terminate it a while before its lease runs out, and kill it in time
    Kill,
    /// Say so on standard error, and let it run
    Warn,
}

/// Which locks, and in which order
#[derive(Args)]
pub struct Selection {
    /// Only keys that begin with this, or match it if it has a * or ?
    ///
    /// * stands for any text and ? for one character; a backslash before one of them takes it for itself.
    #[arg(value_name = "PATTERN")]
    pub pattern: Option<OsString>,

    /// In which order
    #[arg(long, value_name = "ORDER", value_enum, default_value_t = Order::Key)]
    pub sort: Order,

    /// In the opposite order
    #[arg(long)]
    pub reverse: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// By key
    Key,
    /// Leases that ended or end first come first
    Lease,
    /// What is held longest comes first
    Held,
    /// By host, app and process
    Holder,
}

/// Show the locks as they come and go
///
/// A table that is drawn anew every second; a line for each change if standard output is not a terminal.
#[derive(Args)]
pub struct Watch {
    #[command(flatten)]
    pub selection: Selection,
}

/// List the locks
///
/// With who holds each, and for how long. No token is ever shown.
#[derive(Args)]
pub struct List {
    #[command(flatten)]
    pub selection: Selection,

    /// Only those whose lease has run out
    #[arg(long)]
    pub expired: bool,

    /// As a JSON array
    #[arg(long)]
    pub json: bool,
}

/// Show one lock
///
/// Exits with status 1 when nobody holds it.
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
/// So that somebody else can have the lock at once. Deletes only what it has seen: a record that changes hands meanwhile
/// is left alone, and the exit status is 1. The holder finds out when it next renews the lock, and may have
/// continued to work until then.
///
/// Between looking at a lock and breaking it, it may have gone to another holder. The --if options break it only if it
/// is the one that was looked at: nblock show prints what they compare. Given together, all must match.
#[derive(Args)]
#[command(override_usage = "nblock break [OPTIONS] <KEY>\n       nblock break [OPTIONS] --expired [--older-than <S>]")]
pub struct Break {
    /// The name that is locked
    #[arg(required_unless_present = "expired", conflicts_with = "expired")]
    pub key: Option<OsString>,

    /// Break all whose lease has run out
    #[arg(long)]
    pub expired: bool,

    /// Of those, only the ones that ran out so long ago
    #[arg(long, value_name = "S", value_parser = duration::parse, requires = "expired", conflicts_with = "key")]
    pub older_than: Option<Duration>,

    /// Only the hold that has this fence
    #[arg(long, value_name = "N", conflicts_with = "expired")]
    pub if_fence: Option<u64>,

    /// Only what this process holds
    #[arg(long, value_name = "HOST:PID", conflicts_with = "expired")]
    pub if_owner: Option<String>,

    /// Only this very state of the record
    ///
    /// It is another one after every renewal, which comes at a third of the lease.
    #[arg(long, value_name = "V", conflicts_with = "expired")]
    pub if_version: Option<String>,
}

/// Say which store is used and why, and whether it answers
///
/// With its version, the quickest of a few round trips, and how far its clock is from ours where that can be measured.
#[derive(Args)]
pub struct Ping {
    /// As a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Print the SQL that makes a table of locks
///
/// With the grants for the account that uses it: for a database in which that account may make no tables itself. Where it
/// may, the table is made when it is first needed.
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
  nblock run --no-wait jobs:sync -- rsync -a a b   not at all while another one runs
  nblock list                                      who holds what
  nblock watch --sort lease 'jobs:*'               the same, live: some keys, in the order in which leases end
  nblock break jobs:report                         take it away from its holder
  nblock ping                                      which store, and does it answer";

const RUN_NOTES: &str = "\
Examples:
  nblock run jobs:report -- ./report.sh
  nblock run --no-wait --conflict-exit-code 0 cron:sync -- rsync -a a b
  nblock run --wait --expire 5m deploy -- make deploy
  nblock run jobs:x -- sh -c 'echo \"$NBLOCK_KEY $NBLOCK_FENCE\"'

Exit status:
  the command's own; 128+N when signal N ended it; 126 when it cannot be run, 127 when there is none
  64  the command line is wrong                 69  the store could not be reached
  75  the lock could not be had in time         76  the lock was lost, and the command killed
  65  damaged data  70  a defect  71  the system gave no processes, memory or descriptors
  74  standard output could not be written      77  permission denied";

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
