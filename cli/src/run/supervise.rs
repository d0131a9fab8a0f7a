//! Looking after the command while it runs: its signals, its stops, and the lease it relies on.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::error::Error;
use nblock::lock::{Lock, LockState};
use nblock::options::DEFAULT_EXPIRE;

use super::child::{Became, Child, Ending, NotStarted, Program};
use super::guard::{Guard, Post};
use super::signals::{Arrived, Signals, stop_with_group};
use super::terminal::Terminal;
use super::timer::Timer;
use super::waiting::wait_readable;
use crate::arguments::{OnLost, Run};
use crate::duration::show;

/// How long before its deadline the command is asked to end: a third of the lease, no longer than this.
/// A renewal has failed for a third of the lease by then.
const LONGEST_GRACE: Duration = Duration::from_secs(10);

/// Of the grace, what is left when the command is killed: a quarter. It is gone within it unless the
/// machine stands still.
const KILL_BEFORE: u32 = 4;

/// How often an overdue lock is looked at where the command goes on.
const LOOK: Duration = Duration::from_secs(1);

/// How a command ended.
pub struct Supervised {
    pub ending: Ending,
    /// The hold was lost, and that was said.
    pub lost: bool,
    /// It was ended because the hold was lost, or was about to be.
    pub killed: bool,
    /// The terminal was its own when it ended.
    pub had_terminal: bool,
    /// The last signal to end that was passed on to it.
    pub passed_on: Option<libc::c_int>,
}

pub struct Supervisor<'a> {
    lock: &'a Lock,
    key: String,
    signals: &'a Signals,
    terminal: &'a mut Terminal,
    child: Child,
    /// `None`: it was killed, and none could take its place.
    guard: Option<Guard>,
    on_lost: OnLost,
    expire: Duration,
    timer: Timer,
    /// When the library is asked to renew the hold by itself; `None` once it does.
    renew_at: Option<Boottime>,
    /// Readable while the hold is overdue or lost.
    alarm: Option<RawFd>,
    /// Not terminated before this: we come late ourselves, and a renewal is on its way.
    patient_until: Boottime,
    escalation: Escalation,
    passed_on: Option<libc::c_int>,
    /// SIGTERM was sent, and then the lock was renewed.
    called_off: bool,
    /// Why the library does not renew the hold.
    not_renewed: Option<Error>,
}

/// What is being done about the hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escalation {
    /// It is held.
    None,
    /// The command was asked to end.
    Terminating,
    /// The command was killed.
    Killed,
    /// It is overdue, and the command goes on.
    Overdue,
    /// It is lost, and the command goes on.
    Lost,
}

impl<'a> Supervisor<'a> {
    /// Starts the command, guarded.
    pub fn start(
        run: &Run,
        lock: &'a Lock,
        signals: &'a Signals,
        terminal: &'a mut Terminal,
        program: &Program,
    ) -> Result<Supervisor<'a>, NotStarted> {
        let expire = run.expire.unwrap_or(DEFAULT_EXPIRE);
        let timer = Timer::new().map_err(NotStarted::NoProcess)?;
        let post = Post::new().map_err(NotStarted::NotGuarded)?;
        if run.on_lost == OnLost::Kill {
            post.set_deadline(kill_at(Boottime::now() + lock.remaining().unwrap_or_default(), grace(expire)));
        }
        let (child, guard) = Child::start(program, signals, post, terminal)?;
        let remaining = lock.remaining().unwrap_or_default();
        let mut supervisor = Supervisor {
            lock,
            key: lock.key().quoted().to_string(),
            signals,
            terminal,
            child,
            guard,
            on_lost: run.on_lost,
            expire,
            timer,
            // R12: at a third.
            renew_at: Some(Boottime::now() + remaining.saturating_sub(expire / 3 * 2)),
            alarm: None,
            patient_until: Boottime::ZERO,
            escalation: Escalation::None,
            passed_on: None,
            called_off: false,
            not_renewed: None,
        };
        supervisor.set_children();
        supervisor.be_patient();
        Ok(supervisor)
    }

    /// Looks after the command until it has ended.
    pub fn run(mut self) -> Supervised {
        self.attend();
        let ending = loop {
            let alarm = self
                .alarm
                .filter(|_| self.escalation == Escalation::None || self.escalation == Escalation::Terminating);
            wait_readable(&[self.signals.descriptor(), self.timer.descriptor(), alarm.unwrap_or(-1)]);
            self.timer.fired();
            if let Some(ending) = self.heed_signals() {
                break ending;
            }
            self.attend();
        };
        self.end(ending)
    }

    fn end(self, ending: Ending) -> Supervised {
        let had_terminal = self.terminal.is_lent();
        self.terminal.take_back();
        let killed = match (self.escalation, ending) {
            (Escalation::Terminating | Escalation::Killed, _) => true,
            // SIGTERM was ours, even if it turned out not to be needed.
            (_, Ending::Killed(libc::SIGTERM)) if self.called_off => true,
            (_, Ending::Killed(libc::SIGKILL)) if self.guard.as_ref().is_some_and(Guard::fired) => {
                say!("{} was not renewed in time: the command was killed", self.key);
                true
            }
            _ => false,
        };
        if let Some(guard) = &self.guard {
            if killed {
                // What it left behind must be gone as well.
                let _ = self.child.signal_group(libc::SIGKILL);
            }
            guard.dismiss();
        }
        let lost = killed || self.escalation == Escalation::Lost;
        Supervised { ending, lost, killed, had_terminal, passed_on: self.passed_on }
    }

    /// Deals with the signals that came; how the command ended, if it did.
    fn heed_signals(&mut self) -> Option<Ending> {
        while let Some(signal) = self.signals.next() {
            match signal {
                Arrived::Child => {
                    while let Some(became) = self.child.became() {
                        match became {
                            Became::Ended(ending) => return Some(ending),
                            Became::Stopped(signal) => self.stopped(signal),
                        }
                    }
                    self.replace_guard();
                    self.signals.reap_orphans();
                }
                Arrived::End(signal) => {
                    self.passed_on = Some(signal);
                    self.pass_on(signal);
                }
                Arrived::Stop => self.pass_on(libc::SIGTSTP),
                Arrived::Resized => drop(self.child.signal_all(libc::SIGWINCH)),
                Arrived::Continue => {
                    self.terminal.lend(self.child.pid);
                    let _ = self.child.signal_all(libc::SIGCONT);
                }
                // Meant for one program, and the end of others that don't expect it.
                Arrived::User(signal) => self.tell_if_not_passed_on(signal, self.child.signal(signal)),
            }
        }
        None
    }

    fn pass_on(&self, signal: libc::c_int) {
        self.tell_if_not_passed_on(signal, self.child.signal_all(signal));
    }

    fn tell_if_not_passed_on(&self, signal: libc::c_int, sent: io::Result<()>) {
        if let Err(error) = sent {
            say!("signal {signal} could not be passed on to the command: {}", reason(&error));
        }
    }

    /// The command was stopped. From the terminal: so are we, until somebody continues us. Otherwise
    /// (SIGSTOP) that is between the command and the process that stopped it.
    fn stopped(&mut self, signal: libc::c_int) {
        let asks_for_terminal = matches!(signal, libc::SIGTTIN | libc::SIGTTOU);
        if !asks_for_terminal && signal != libc::SIGTSTP {
            return;
        }
        self.terminal.wanted |= asks_for_terminal;
        if asks_for_terminal && self.terminal.is_ours() {
            self.terminal.lend(self.child.pid);
            let _ = self.child.signal_all(libc::SIGCONT);
            return;
        }
        self.terminal.take_back();
        let was_stopped = stop_with_group();
        // Nothing was renewed meanwhile.
        self.be_patient();
        drop(self.lock.refresh(None));
        self.attend();
        self.terminal.lend(self.child.pid);
        if asks_for_terminal && !was_stopped && !self.terminal.is_lent() {
            // Nobody can stop us, or give us the terminal: as the kernel does with such groups.
            let _ = self.child.signal_all(libc::SIGHUP);
        }
        let _ = self.child.signal_all(libc::SIGCONT);
    }

    /// Leaves a renewal that is late through our own fault half of the time that there is.
    fn be_patient(&mut self) {
        let left = self.lock.remaining().unwrap_or_default();
        self.patient_until = Boottime::now() + left.saturating_sub(self.grace() / KILL_BEFORE) / 2;
    }

    /// Ensures that the command is guarded, should somebody have killed the guard.
    fn replace_guard(&mut self) {
        let Some(guard) = &self.guard else { return };
        // SAFETY: a system call that writes nothing.
        if unsafe { libc::waitpid(guard.pid, std::ptr::null_mut(), libc::WNOHANG) } != guard.pid {
            return;
        }
        self.guard = match Guard::replace(self.child.pid) {
            Ok(guard) => Some(guard),
            Err(error) => {
                say!("the command's guard was killed, and another one could not be started: {error}");
                None
            }
        };
        self.set_children();
    }

    fn set_children(&self) {
        self.signals.set_children([self.guard.as_ref().map_or(0, |guard| guard.pid), self.child.pid]);
    }

    fn grace(&self) -> Duration {
        grace(self.expire)
    }

    /// Looks at the hold, does what is to be done, and sets the timer for the next time.
    fn attend(&mut self) {
        let now = Boottime::now();
        if self.renew_at.is_some_and(|at| at <= now) {
            self.keep();
        }
        let state = self.lock.state();
        let deadline = now + self.lock.remaining().unwrap_or_default();
        let next = match self.on_lost {
            OnLost::Kill => self.enforce(now, state, deadline),
            OnLost::Warn => self.warn(now, state, deadline),
        };
        self.timer.set(self.renew_at.map_or(next, |at| next.min(at)));
    }

    /// Has the library renew the hold from now on.
    fn keep(&mut self) {
        match self.lock.enable_auto_refresh().and_then(|()| self.lock.lost_fd()) {
            Ok(descriptor) => (self.alarm, self.renew_at, self.not_renewed) = (Some(descriptor), None, None),
            Err(_) if gone(self.lock.state()) => self.renew_at = None,
            Err(error) => {
                // No threads available: tried again until the command has to be ended.
                tracing::warn!("{} is not renewed: {error}", self.key);
                self.not_renewed = Some(error);
                self.renew_at = Some(Boottime::now() + (self.expire / 30).max(Duration::from_millis(1)));
            }
        }
    }

    /// Ends the command in time; when to look again.
    fn enforce(&mut self, now: Boottime, state: LockState, deadline: Boottime) -> Boottime {
        if self.escalation == Escalation::Killed {
            return Boottime::NEVER;
        }
        let grace = self.grace();
        let kill_at = kill_at(deadline, grace);
        let terminate_at = (deadline - grace).max(self.patient_until.min(kill_at));
        let lost = gone(state);
        if lost || now >= kill_at {
            self.escalation = Escalation::Killed;
            let killed = self.child.signal_all(libc::SIGKILL);
            let why = if lost { "lost (it was broken, or its record was removed)" } else { "not renewed in time" };
            match killed {
                Ok(()) => say!("{} was {why}: killed the command", self.key),
                Err(error) => say!(
                    "{} was {why}, and the command could not be killed: {}. It is still running, and another process \
                     may hold the lock",
                    self.key,
                    reason(&error)
                ),
            }
            return Boottime::NEVER;
        }
        if let Some(guard) = &self.guard {
            guard.set_deadline(kill_at);
        }
        match (now >= terminate_at, self.escalation) {
            (true, Escalation::Terminating) => {}
            (true, _) => {
                self.escalation = Escalation::Terminating;
                let told = self.child.signal_all(libc::SIGTERM);
                // One that is stopped would not hear it.
                let _ = self.child.signal_all(libc::SIGCONT);
                // Last: the reader of our messages may be slow.
                let why = self.not_renewed.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
                let left = show(deadline.since(now));
                match told {
                    Ok(()) => say!("{} cannot be renewed{why}, and has {left} left: ending the command", self.key),
                    Err(error) => say!(
                        "{} cannot be renewed{why}, and has {left} left; SIGTERM could not be sent to the command: {}",
                        self.key,
                        reason(&error)
                    ),
                }
            }
            (false, Escalation::Terminating) => {
                (self.escalation, self.called_off) = (Escalation::None, true);
                say!("{} was renewed after all: the command may go on", self.key);
            }
            (false, _) => {}
        }
        match self.escalation {
            // A renewal is noticed soon.
            Escalation::Terminating => kill_at.min(now + grace / 16),
            // After the next renewal, or when it did not come.
            _ => terminate_at.min(now + self.expire / 3),
        }
    }

    /// Says what happens to the hold; when to look again.
    fn warn(&mut self, now: Boottime, state: LockState, deadline: Boottime) -> Boottime {
        let escalation = match state {
            _ if gone(state) => Escalation::Lost,
            LockState::Overdue => Escalation::Overdue,
            _ => Escalation::None,
        };
        if escalation != self.escalation {
            self.escalation = escalation;
            match escalation {
                Escalation::Lost => say!(
                    "{} was lost (it was broken, or its record was removed): another process may hold it",
                    self.key
                ),
                Escalation::Overdue => say!("{} is overdue: others may take it over", self.key),
                _ => say!("{} was renewed, and is held again", self.key),
            }
        }
        match escalation {
            Escalation::Lost => Boottime::NEVER,
            Escalation::Overdue => now + LOOK,
            _ => deadline,
        }
    }
}

fn grace(expire: Duration) -> Duration {
    LONGEST_GRACE.min(expire / 3)
}

/// When the command is killed, if nothing is renewed before.
fn kill_at(deadline: Boottime, grace: Duration) -> Boottime {
    deadline - grace / KILL_BEFORE
}

/// Why a signal could not be sent. Rust's text has the number behind it, which says nothing more.
fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    match error.raw_os_error() {
        Some(libc::EPERM) => format!("{text}: it runs with another user's rights"),
        _ => text.to_string(),
    }
}

/// Whether the store has said that the hold is not ours any more.
pub fn gone(state: LockState) -> bool {
    // Idle once a refresh of ours was reported lost.
    matches!(state, LockState::Lost | LockState::Idle)
}
