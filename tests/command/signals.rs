//! Signals, and the guard.

use std::process::ExitStatus;
use std::time::Duration;

use nblock::clock::Boottime;

use super::{Running, Store, state, until};

#[test]
fn signals_reach_the_command() {
    let store = Store::new();
    let mut running = store.start(
        &[],
        "for s in HUP INT QUIT TERM USR1 USR2 CONT WINCH; do trap \"echo $s\" $s; done
         trap 'kill -9 $p; exit 9' TSTP; echo in
         while :; do sleep 1000 & p=$!; wait $p; kill -9 $p; done 2>/dev/null",
    );
    running.out.expect("in");
    for (signal, name) in [
        (libc::SIGHUP, "HUP"),
        (libc::SIGINT, "INT"),
        (libc::SIGQUIT, "QUIT"),
        (libc::SIGTERM, "TERM"),
        (libc::SIGUSR1, "USR1"),
        (libc::SIGUSR2, "USR2"),
        (libc::SIGCONT, "CONT"),
        (libc::SIGWINCH, "WINCH"),
    ] {
        running.signal(signal);
        running.out.expect(name);
    }
    running.signal(libc::SIGTSTP);
    assert_eq!(running.status(), Some(9));
}

#[test]
fn signals_end_the_commands_children_too() {
    let store = Store::new();
    let mut running = store.start(&[], "sleep 1000 & sleep 1000 & echo in; wait");
    running.out.expect("in");
    running.signal(libc::SIGTERM);
    assert_eq!(running.status(), Some(128 + libc::SIGTERM));
    assert_eq!(running.out.rest(), [""; 0], "nobody has its output open any more");
    assert_eq!(store.said(&["list"]), "");
}

#[test]
fn what_was_ignored_stays_ignored() {
    let store = Store::new();
    let mut command = store.command("sh");
    let script = format!("trap '' HUP; exec {} run k -- sh -c 'echo in; read x; exit 4'", super::NBLOCK);
    command.args(["-c", &script]);
    let mut running = Running::start(command);
    running.out.expect("in");
    running.signal(libc::SIGHUP);
    assert_eq!(running.finish().code(), Some(4));
}

/// Sends a signal to one that waits for the lock; how it ended.
fn interrupt_a_waiter(store: &Store, signal: i32) -> ExitStatus {
    let mut command = store.nblock(&["run", "--wait", "k", "--", "echo", "never"]);
    command.env("NBLOCK_LOG", "debug");
    let mut waiter = Running::start(command);
    // It has taken over its signals by then.
    waiter.err.expect_part("the store is");
    waiter.signal(signal);
    let status = waiter.wait();
    assert_eq!(waiter.out.rest(), [""; 0]);
    status
}

#[test]
fn a_waiter_that_is_interrupted_ends_and_leaves_nothing() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x; exit 0");
    holder.out.expect("in");
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
        assert_eq!(interrupt_a_waiter(&store, signal).code(), Some(128 + signal));
    }
    let records = store.json(&["list", "--json"]);
    assert_eq!(records.as_array().unwrap().len(), 1);
    assert_eq!(records[0]["owner"]["pid"], holder.pid());
    assert!(holder.finish().success());
    assert_eq!(store.said(&["list"]), "");
}

#[test]
fn killed_with_sigkill_it_takes_the_command_and_its_children_along() {
    let store = Store::new();
    let mut running =
        store.start(&["--expire", "4"], "sleep 1000 & sh -c 'trap \"\" TERM HUP; sleep 1000' & echo in; wait");
    running.out.expect("in");
    let seen = Boottime::now();
    let left = store.json(&["show", "--json", "k"])["expires_in"].as_f64().unwrap();
    running.signal(libc::SIGKILL);
    assert_eq!(running.wait().code(), None);
    assert_eq!(running.out.rest(), [""; 0], "the whole group is gone");
    // Nobody gave the lock back: it is another's when its lease has run out, and not before.
    assert!(store.run(&["run", "--wait", "k", "--", "true"]).status.success());
    assert!(Boottime::now().since(seen) >= Duration::from_secs_f64(left));
}

#[test]
fn one_in_another_goes_with_it() {
    let store = Store::new();
    let script = format!("{} run inner -- sh -c 'echo in; sleep 1000'", super::NBLOCK);
    let mut running = store.start(&[], &format!("exec {script}"));
    running.out.expect("in");
    assert_eq!(store.json(&["list", "--json"]).as_array().unwrap().len(), 2);
    running.signal(libc::SIGKILL);
    running.wait();
    assert_eq!(running.out.rest(), [""; 0]);
}

/// The guard of a running command.
fn guard_of(running: &Running) -> Option<i32> {
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let children = std::fs::read_to_string(children).unwrap_or_default();
    children.split_whitespace().map(|pid| pid.parse().unwrap()).find(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "nblock-guard\n")
            && state(*pid) != Some('Z')
    })
}

#[test]
fn a_guard_that_is_killed_is_replaced() {
    let store = Store::new();
    let mut running = store.start(&[], "sleep 1000 & echo in; wait");
    running.out.expect("in");
    let first = until(|| guard_of(&running));
    super::send(first, libc::SIGKILL);
    let second = until(|| guard_of(&running).filter(|second| *second != first));
    // In the command's group, as soon as it guards.
    until(|| {
        let group = unsafe { libc::getpgid(second) };
        (group != unsafe { libc::getpgid(running.pid()) }).then_some(())
    });
    running.signal(libc::SIGKILL);
    running.wait();
    assert_eq!(running.out.rest(), [""; 0]);
}

#[test]
fn what_the_command_leaves_in_the_background_is_left_alone() {
    let store = Store::new();
    let mut running = store.start(&[], "(read x; echo still there) <&0 & exit 0");
    assert_eq!(running.wait().code(), Some(0));
    assert_eq!(store.said(&["list"]), "", "the lock is given back when the command has ended");
    drop(running.process.stdin.take());
    running.out.expect("still there");
}

#[test]
fn stopped_for_too_long_it_loses_its_command_before_the_lease_is_over() {
    let store = Store::new();
    let mut running = store.start(&["--expire", "1.5"], "echo $$; exec sleep 1000");
    let command: i32 = running.out.next().unwrap().parse().unwrap();
    running.signal(libc::SIGSTOP);
    // Whoever has the lock next looks: a zombie does not run any more.
    let look = "grep -q '^State:.Z' /proc/$1/status || ! test -e /proc/$1";
    let next = store.run(&["run", "--wait", "k", "--", "sh", "-c", look, "sh", &command.to_string()]);
    assert!(next.status.success(), "{next:?}");
    running.signal(libc::SIGCONT);
    assert_eq!(running.status(), Some(76));
}
