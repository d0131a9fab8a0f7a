//! Signals, and the guard.

use std::path::Path;
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
    let left = store.json(&["show", "--json", "k"])["remaining"].as_f64().unwrap();
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
    // The next holder looks: a zombie does not run any more.
    let look = "grep -q '^State:.Z' /proc/$1/status || ! test -e /proc/$1";
    let next = store.run(&["run", "--wait", "k", "--", "sh", "-c", look, "sh", &command.to_string()]);
    assert!(next.status.success(), "{next:?}");
    running.signal(libc::SIGCONT);
    assert_eq!(running.status(), Some(76));
}

#[test]
fn orphans_are_waited_for_as_an_init_does() {
    let store = Store::new();
    // The shell in between ends, and leaves a process behind, which ends as well.
    let script = "for i in 1 2 3; do sh -c 'sh -c \"read x\" <&8 & echo $!' 8<&0; done; echo in; read x";
    let mut command = store.nblock(&["run", "k", "--", "sh", "-c", script]);
    // As PID 1 of a container it would be given them; so it is by this, which goes with it through exec.
    // SAFETY: a system call.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, || {
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
            Ok(())
        });
    }
    let mut running = Running::start(command);
    let orphans: Vec<i32> = (0..3).map(|_| running.out.next().unwrap().parse().unwrap()).collect();
    running.out.expect("in");
    for &orphan in &orphans {
        super::send(orphan, libc::SIGKILL);
    }
    until(|| orphans.iter().all(|&orphan| state(orphan).is_none()).then_some(()));
    assert!(guard_of(&running).is_some(), "the guard is not an orphan");
    assert_eq!(running.finish().code(), Some(1), "read at the end of its input");
    assert_eq!(running.err.rest(), [""; 0]);
}

#[test]
fn a_command_that_cannot_be_killed_is_not_said_to_be() {
    let store = Store::new();
    let setpriv = Path::new("/usr/bin/setpriv");
    if unsafe { libc::geteuid() } != 0 || !setpriv.exists() {
        println!("\nSKIPPED command-rights: needs root and setpriv");
        return;
    }
    // A program with root's rights for everybody, as sudo is, and a user without them.
    const USER: u32 = 4711;
    std::fs::create_dir(&store.0).unwrap();
    let raise = store.0.join("raise");
    std::fs::copy(setpriv, &raise).unwrap();
    std::fs::set_permissions(&raise, std::os::unix::fs::PermissionsExt::from_mode(0o4755)).unwrap();
    let directory = store.0.join("locks");
    std::fs::create_dir(&directory).unwrap();
    std::fs::set_permissions(&directory, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&directory, Some(USER), Some(USER)).unwrap();
    // The command that was built may lie where only its owner can reach it.
    let nblock = store.0.join("nblock");
    std::fs::copy(super::NBLOCK, &nblock).unwrap();
    let as_user = |arguments: &[&str]| {
        let mut command = store.command(nblock.to_str().unwrap());
        command.env("NBLOCK_DIR", &directory).args(arguments);
        std::os::unix::process::CommandExt::uid(&mut command, USER);
        command
    };
    let raise = raise.to_str().unwrap();
    let script = "echo in; read x; exit 3";
    let mut running =
        Running::start(as_user(&["run", "--expire", "2", "k", "--", raise, "--reuid=0", "sh", "-c", script]));
    running.out.expect("in");
    running.signal(libc::SIGTERM);
    running.err.expect_part("signal 15 could not be passed on to the command: Operation not permitted");
    assert!(as_user(&["break", "k"]).output().unwrap().status.success());
    let said = running.err.expect_part("\"k\" was lost");
    assert!(
        said.contains("could not be killed: Operation not permitted") && !said.contains("killed the command"),
        "{said}"
    );
    // It runs on.
    assert_eq!(running.finish().code(), Some(76));
}
