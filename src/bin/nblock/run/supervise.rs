//! Looking after the command while it runs: its signals, its stops, and the lease it relies on.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::lock::{Lock, LockState};
use nblock::options::DEFAULT_EXPIRE;

use super::child::{Became, Child, Ending};
use super::guard::Guard;
use super::signals::{Arrived, Signals, stop_with_group};
use super::terminal::Terminal;
use super::timer::Timer;
use super::waiting::wait_readable;
use crate::arguments::{OnLost, Run};
use crate::duration::show;
use crate::failure::Failure;

/// How long before its deadline the command is asked to end: a third of the lease, no longer than this.
/// A renewal has failed for a third of the lease by then.
const LONGEST_GRACE: Duration = Duration::from_secs(10);

/// Of the grace, what is left when the command is killed: a quarter. It is gone within it unless the
/// machine stands still.
const KILL_BEFORE: u32 = 4;

/// How often an overdue lock is looked at where the command goes on.
const LOOK: Duration = Duration::from_secs(1);

/// What came of a command.
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
    /// It never ran, for this reason.
    pub exec_error: Option<io::Error>,
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
    course: Course,
    passed_on: Option<libc::c_int>,
    /// SIGTERM was sent, and then the lock was renewed.
    called_off: bool,
}

/// What is being done about the hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    /// It is held.
    Well,
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
    pub fn new(
        run: &Run,
        lock: &'a Lock,
        signals: &'a Signals,
        guard: Guard,
        child: Child,
        terminal: &'a mut Terminal,
    ) -> io::Result<Supervisor<'a>> {
        let expire = run.expire.unwrap_or(DEFAULT_EXPIRE);
        let remaining = lock.remaining().unwrap_or_default();
        Ok(Supervisor {
            lock,
            key: lock.key().quoted().to_string(),
            signals,
            terminal,
            child,
            guard: Some(guard),
            on_lost: run.on_lost,
            expire,
            timer: Timer::new()?,
            // R12: at a third.
            renew_at: Some(Boottime::now() + remaining.saturating_sub(expire / 3 * 2)),
            alarm: None,
            patient_until: Boottime::ZERO,
            course: Course::Well,
            passed_on: None,
            called_off: false,
        })
    }

    /// Lets the command go, guarded, and looks after it until it has ended.
    pub fn run(mut self) -> Result<Supervised, Failure> {
        let guarded = self.guard.as_ref().map_or(Ok(()), |guard| guard.protect(self.child.pid));
        guarded.map_err(|error| Failure::system("the command could not be guarded", &error))?;
        self.be_patient();
        self.attend();
        self.terminal.lend(self.child.pid);
        self.child.release();
        let ending = loop {
            let alarm = self.alarm.filter(|_| self.course == Course::Well || self.course == Course::Terminating);
            wait_readable(&[self.signals.descriptor(), self.timer.descriptor(), alarm.unwrap_or(-1)]);
            self.timer.fired();
            if let Some(ending) = self.heed_signals() {
                break ending;
            }
            self.attend();
        };
        Ok(self.end(ending))
    }

    fn end(self, ending: Ending) -> Supervised {
        let had_terminal = self.terminal.is_lent();
        self.terminal.take_back();
        let killed = match (self.course, ending) {
            (Course::Terminating | Course::Killed, _) => true,
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
                self.child.signal_group(libc::SIGKILL);
            }
            guard.dismiss();
        }
        let lost = killed || self.course == Course::Lost;
        let (passed_on, exec_error) = (self.passed_on, self.child.exec_error());
        Supervised { ending, lost, killed, had_terminal, passed_on, exec_error }
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
                }
                Arrived::End(signal) => {
                    self.passed_on = Some(signal);
                    self.child.signal_all(signal);
                }
                Arrived::Stop => self.child.signal_all(libc::SIGTSTP),
                Arrived::Resized => self.child.signal_all(libc::SIGWINCH),
                Arrived::Continue => {
                    self.terminal.lend(self.child.pid);
                    self.child.signal_all(libc::SIGCONT);
                }
                // Meant for one program, and the end of others that don't expect it.
                Arrived::User(signal) => self.child.signal(signal),
            }
        }
        None
    }

    /// The command was stopped. From the terminal: so are we, until somebody continues us. Otherwise
    /// (SIGSTOP) that is between the command and whoever stopped it.
    fn stopped(&mut self, signal: libc::c_int) {
        let asks_for_terminal = matches!(signal, libc::SIGTTIN | libc::SIGTTOU);
        if !asks_for_terminal && signal != libc::SIGTSTP {
            return;
        }
        self.terminal.wanted |= asks_for_terminal;
        if asks_for_terminal && self.terminal.is_ours() {
            self.terminal.lend(self.child.pid);
            self.child.signal_all(libc::SIGCONT);
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
            self.child.signal_all(libc::SIGHUP);
        }
        self.child.signal_all(libc::SIGCONT);
    }

    /// Leaves a renewal that is late through our own fault half of the time that there is.
    fn be_patient(&mut self) {
        let left = self.lock.remaining().unwrap_or_default();
        self.patient_until = Boottime::now() + left.saturating_sub(self.grace() / KILL_BEFORE) / 2;
    }

    /// Sees to it that the command is guarded, should somebody have killed the guard.
    fn replace_guard(&mut self) {
        let Some(guard) = &self.guard else { return };
        // SAFETY: a system call that writes nothing.
        if unsafe { libc::waitpid(guard.pid, std::ptr::null_mut(), libc::WNOHANG) } != guard.pid {
            return;
        }
        self.guard = match Guard::start().and_then(|guard| guard.protect(self.child.pid).map(|()| guard)) {
            Ok(guard) => Some(guard),
            Err(error) => {
                say!("the command's guard was killed, and no other could be started: {error}");
                None
            }
        };
    }

    fn grace(&self) -> Duration {
        LONGEST_GRACE.min(self.expire / 3)
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
            Ok(descriptor) => (self.alarm, self.renew_at) = (Some(descriptor), None),
            Err(_) if gone(self.lock.state()) => self.renew_at = None,
            Err(error) => {
                // No threads to be had: tried again until the command has to be ended.
                tracing::warn!("{} is not renewed: {error}", self.key);
                self.renew_at = Some(Boottime::now() + (self.expire / 30).max(Duration::from_millis(1)));
            }
        }
    }

    /// Ends the command in time; when to look again.
    fn enforce(&mut self, now: Boottime, state: LockState, deadline: Boottime) -> Boottime {
        if self.course == Course::Killed {
            return Boottime::NEVER;
        }
        let grace = self.grace();
        let kill_at = deadline - grace / KILL_BEFORE;
        let terminate_at = (deadline - grace).max(self.patient_until.min(kill_at));
        let lost = gone(state);
        if lost || now >= kill_at {
            self.course = Course::Killed;
            self.child.signal_all(libc::SIGKILL);
            match lost {
                true => say!("{} was lost: killed the command", self.key),
                false => say!("{} was not renewed in time: killed the command", self.key),
            }
            return Boottime::NEVER;
        }
        if let Some(guard) = &self.guard {
            guard.set_deadline(kill_at);
        }
        match (now >= terminate_at, self.course) {
            (true, Course::Terminating) => {}
            (true, _) => {
                self.course = Course::Terminating;
                self.child.signal_all(libc::SIGTERM);
                // One that is stopped would not hear it.
                self.child.signal_all(libc::SIGCONT);
                // Last: whoever reads our words may be slow.
                say!("{} cannot be renewed, and has {} left: ending the command", self.key, show(deadline.since(now)));
            }
            (false, Course::Terminating) => {
                (self.course, self.called_off) = (Course::Well, true);
                say!("{} was renewed after all: the command may go on", self.key);
            }
            (false, _) => {}
        }
        match self.course {
            // A renewal is noticed soon.
            Course::Terminating => kill_at.min(now + grace / 16),
            // After the next renewal, or when it did not come.
            _ => terminate_at.min(now + self.expire / 3),
        }
    }

    /// Says what happens to the hold; when to look again.
    fn warn(&mut self, now: Boottime, state: LockState, deadline: Boottime) -> Boottime {
        let course = match state {
            _ if gone(state) => Course::Lost,
            LockState::Overdue => Course::Overdue,
            _ => Course::Well,
        };
        if course != self.course {
            self.course = course;
            match course {
                Course::Lost => say!("{} was lost: somebody else may have it", self.key),
                Course::Overdue => say!("{} is overdue: others may take it over", self.key),
                _ => say!("{} was renewed, and is held again", self.key),
            }
        }
        match course {
            Course::Lost => Boottime::NEVER,
            Course::Overdue => now + LOOK,
            _ => deadline,
        }
    }
}

/// Whether the store has said that the hold is not ours any more.
pub fn gone(state: LockState) -> bool {
    // Idle once a refresh of ours was told.
    matches!(state, LockState::Lost | LockState::Idle)
}
