//! `nblock run`: exit statuses, exclusion, environment, waiting.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use super::{Running, Store};

#[track_caller]
fn status(store: &Store, arguments: &[&str], expected: i32, says: &str) {
    let output = store.run(arguments);
    assert_eq!(output.status.code(), Some(expected), "{arguments:?}: {output:?}");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains(says), "{arguments:?}: {says:?} is not in {err:?}");
}

#[test]
fn the_status_is_the_commands() {
    let store = Store::new();
    status(&store, &["run", "k", "--", "true"], 0, "");
    status(&store, &["run", "k", "--", "sh", "-c", "exit 3"], 3, "");
    status(&store, &["run", "k", "--", "sh", "-c", "kill -9 $$"], 128 + 9, "");
    status(&store, &["run", "k", "--", "sh", "-c", "kill -TERM $$"], 128 + 15, "");
    status(&store, &["run", "k", "--", "no-such-command-here"], 127, "could not run no-such-command-here: ");
    status(&store, &["run", "k", "--", "/"], 126, "could not run /: ");
    let script = std::env::temp_dir().join(format!("nblock-command-{}-script", std::process::id()));
    std::fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    status(
        &store,
        &["run", "k", "--", script.to_str().unwrap()],
        127,
        "the interpreter in its first line does not exist",
    );
    std::fs::remove_file(&script).unwrap();
    status(&store, &["run", "k", "--", "no-such-command here"], 127, "could not run \"no-such-command here\": ");
    assert_eq!(store.said(&["list"]), "", "each gave its lock back");
}

#[test]
fn usage_errors_name_the_value_and_the_rule() {
    let store = Store::new();
    for (arguments, says) in [
        (&[][..], "Usage"),
        (&["fly"], "fly"),
        (&["run", "k"], "<COMMAND>"),
        (&["run", "--", "true"], "<KEY>"),
        (&["run", "", "--", "true"], "got an empty one"),
        (&["run", "--expire", "0", "k", "--", "true"], "1 ms to 366 days"),
        (&["run", "--expire", "367d", "k", "--", "true"], "1 ms to 366 days"),
        (&["run", "--expire", "soon", "k", "--", "true"], "'soon'"),
        (&["run", "--timeout", "-1", "k", "--", "true"], "'-1'"),
        (&["run", "--timeout", "-1", "k", "--", "true"], "must be seconds"),
        (&["run", "k", "true"], "nblock run KEY -- COMMAND"),
        (&["run", "--timeout", "1e3", "k", "--", "true"], "must be seconds"),
        (&["run", "--wait", "--no-wait", "k", "--", "true"], "--no-wait"),
        (&["run", "--wait", "--timeout", "1", "k", "--", "true"], "--timeout"),
        (&["run", "--on-lost", "weep", "k", "--", "true"], "kill, warn"),
        (&["run", "--conflict-exit-code", "256", "k", "--", "true"], "0..=255"),
        (&["run", "--url", "nowhere:", "k", "--", "true"], "nowhere"),
        (&["list", "--url", "embedded:relative"], "absolute"),
        (&["break"], "<KEY>"),
        (&["break", "--older-than", "1", "k"], "cannot be used with"),
        (&["break", "--older-than", "1"], "--expired"),
        (&["show"], "<KEY>"),
    ] {
        status(&store, arguments, 64, says);
    }
    status(&store, &["--version"], 0, "");
    assert!(store.said(&["--help"]).contains("Examples:"));
    assert!(store.said(&["run", "--help"]).contains("Exit status:"));
}

#[test]
fn an_unreachable_store_is_69() {
    let store = Store::new();
    // A directory cannot be in a file.
    let url = "embedded:/dev/null/store";
    status(&store, &["run", "--url", url, "k", "--", "true"], 69, "/dev/null/store");
    status(&store, &["list", "--url", url], 69, "/dev/null/store");
    status(&store, &["ping", "--url", url], 69, "/dev/null/store");
    let output = store.run(&["ping", "--json", "--url", url]);
    assert_eq!(output.status.code(), Some(69));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["reachable"], false);
}

#[test]
fn who_cannot_have_it_is_told_who_has() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x; exit 5");
    holder.out.expect("in");
    let held = format!("\"k\" is held by {}:{} sh", hostname(), holder.pid());
    status(&store, &["run", "--no-wait", "k", "--", "true"], 75, &held);
    status(&store, &["run", "--timeout", "0", "k", "--", "true"], 75, &held);
    status(&store, &["run", "--timeout", "50ms", "k", "--", "true"], 75, &held);
    status(&store, &["run", "--timeout", "0.05", "--conflict-exit-code", "7", "k", "--", "false"], 7, &held);
    let skipped = store.run(&["run", "--no-wait", "--conflict-exit-code", "0", "k", "--", "false"]);
    assert!(skipped.status.success() && skipped.stderr.is_empty(), "cron would send a mail: {skipped:?}");
    status(&store, &["run", "--no-wait", "another", "--", "true"], 0, "");
    assert_eq!(holder.finish().code(), Some(5));
    status(&store, &["run", "--no-wait", "k", "--", "true"], 0, "");
}

#[test]
fn a_command_that_waits_for_its_own_lock_is_told_so() {
    let store = Store::new();
    let inner = |key: &str| format!("{} run --no-wait {key} -- true; exit $?", super::NBLOCK);
    let own = ", the nblock run that started this command, and was not granted in time";
    status(&store, &["run", "k", "--", "sh", "-c", &inner("k")], 75, own);
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x; exit 5");
    holder.out.expect("in");
    status(&store, &["run", "another", "--", "sh", "-c", &inner("k")], 75, "s left), and was not granted in time");
    let environment = format!("NBLOCK_KEY=k {}", inner("k"));
    status(&store, &["run", "another", "--", "sh", "-c", &environment], 75, "s left), and was not granted in time");
    assert_eq!(holder.finish().code(), Some(5));
}

#[test]
fn the_page_and_the_man_page_list_every_status() {
    let page = include_str!("../../docs/command.md");
    let manual = Store::new().said(&["manual"]);
    let statuses = include_str!("../../cli/src/failure.rs").lines().filter_map(|line| {
        let (name, number) = line.trim().strip_prefix("pub const ")?.strip_suffix(';')?.split_once(": u8 = ")?;
        Some((name, number))
    });
    let mut count = 0;
    for (name, number) in statuses {
        count += 1;
        assert!(
            page.lines().any(|line| line.starts_with("| ") && line.split('|').nth(1).unwrap().contains(number)),
            "{name}"
        );
        assert!(manual.contains(number), "{name}");
    }
    assert!(count >= 12);
}

#[test]
fn keys_that_begin_with_a_dash() {
    let store = Store::new();
    status(&store, &["run", "-k", "--", "true"], 64, "a key that begins with `-` is given as --key=KEY");
    status(&store, &["run", "--key", "-k", "k", "--", "true"], 64, "cannot be used with");
    assert_eq!(store.said(&["run", "--key=-k", "--", "sh", "-c", "echo \"$NBLOCK_KEY\""]), "-k\n");
    assert_eq!(store.said(&["run", "--key", "--wait", "--", "sh", "-c", "echo \"$NBLOCK_KEY\""]), "--wait\n");
    super::lease(&store, "-k", std::time::Duration::from_secs(600));
    for arguments in [&["show", "-k"], &["break", "-k"], &["list", "-k"]] {
        status(&store, arguments, 64, "use '-- -k'");
    }
    assert!(store.said(&["show", "--", "-k"]).contains("-k"));
    assert!(store.said(&["list", "--", "-"]).contains("-k"));
    assert!(store.said(&["break", "--", "-k"]).contains("broke \"-k\""));
}

#[test]
fn arguments_that_run_does_not_take_are_explained() {
    let store = Store::new();
    let flock = "flock's -n is --no-wait";
    status(&store, &["run", "-n", "k", "--", "true"], 64, flock);
    status(&store, &["run", "--nonblock", "k", "--", "true"], 64, flock);
    status(&store, &["run", "k", "-c", "true"], 64, flock);
    status(&store, &["run", "--wait", "30", "k", "--", "true"], 64, "write --timeout 30");
    status(&store, &["run", "--wait", "30", "k", "true"], 64, "write --timeout 30");
    status(&store, &["run", "--wait", "a", "key", "--", "true"], 64, "between quotes");
    status(&store, &["run", "a", "key", "--", "true", "-n"], 64, "between quotes");
    status(&store, &["run", "k", "true"], 64, "the command comes after `--`");
}

#[test]
fn output_that_cannot_be_written_is_74() {
    let store = Store::new();
    super::lease(&store, "k", std::time::Duration::from_secs(600));
    let shell = |script: &str| {
        let mut command = store.command("sh");
        command.args(["-c", &script.replace("nblock", super::NBLOCK)]).stdin(Stdio::null());
        command.output().unwrap()
    };
    for what in [
        "list",
        "list --json",
        "show k",
        "ping",
        "ping --json",
        "manual",
        "completions bash",
        "--help",
        "run --help",
        "--version",
        "watch",
    ] {
        let output = shell(&format!("nblock {what} >&-"));
        assert_eq!(output.status.code(), Some(74), "{what}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "nblock: standard output is closed\n", "{what}");
        let output = shell(&format!("nblock {what} >/dev/full"));
        assert_eq!(output.status.code(), Some(74), "{what}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("could not be written"), "{what}: {output:?}");
    }
    // A reader that has seen enough is no error.
    for what in ["--help", "run --help", "manual"] {
        assert_eq!(shell(&format!("nblock {what} | head -n 1")).stderr, b"", "{what}");
    }
    // What was broken was broken, and the rest of what there is to say is said by the status.
    assert_eq!(shell("nblock break k >&-").status.code(), Some(74));
    assert_eq!(store.said(&["list"]), "");
    // What the command gets is what we got.
    for closed in ["<&-", ">&-", "2>&-"] {
        let number = if closed == "<&-" {
            "0"
        } else if closed == ">&-" {
            "1"
        } else {
            "2"
        };
        let look = format!("test -e /proc/self/fd/{number} && exit 9; exit 0");
        assert_eq!(shell(&format!("nblock run k -- sh -c '{look}' {closed}")).status.code(), Some(0), "{closed}");
        assert_eq!(shell(&format!("sh -c '{look}' {closed}")).status.code(), Some(0), "and so it is without us");
    }
}

#[test]
fn few_descriptors_end_in_words_and_a_status_of_the_table() {
    let store = Store::new();
    store.said(&["ping"]);
    let mut enough = 0;
    // Below 4 the system's loader cannot load the C library.
    for limit in 4..40 {
        for arguments in [
            &["run", "k", "--", "sh", "-c", "exit 9"][..],
            &["run", "--expire", "1.5", "k", "--", "sleep", "0.6"],
            &["list"],
            &["ping"],
        ] {
            // Where there are too few to begin with, or more than enough, there is no renewal to look at.
            if arguments.contains(&"sleep") && !(12..24).contains(&limit) {
                continue;
            }
            let mut command = store.nblock(arguments);
            // SAFETY: a system call.
            unsafe {
                std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
                    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
                    libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
                    Ok(())
                });
            }
            let output = command.output().unwrap();
            let err = String::from_utf8_lossy(&output.stderr);
            let done = if arguments.contains(&"exit 9") { 9 } else { 0 };
            let words = err.starts_with("nblock: ") && err.contains("Too many open files");
            match output.status.code() {
                Some(71) if words => {}
                // It could not be renewed, for lack of descriptors, and so the command was ended in time.
                Some(76) if words && err.contains("cannot be renewed (") => {}
                Some(status) if status == done => enough += 1,
                _ => panic!("{limit} {arguments:?}: {output:?}"),
            }
        }
    }
    assert!(enough > 40, "most of these limits are enough ({enough})");
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_string()
}

#[test]
fn one_at_a_time_and_each_with_a_larger_fence() {
    let store = Store::new();
    store.said(&["ping"]);
    let counter = store.0.join("counter");
    std::fs::write(&counter, "0\n").unwrap();
    // Read, and written back one higher: two at once would lose one.
    let script = format!(
        "i=0; while [ $i -lt 12 ]; do i=$((i+1)); \
         {} run --wait --expire 1m k -- sh -c 'read n <\"$1\"; echo $((n+1)) >\"$1\"; echo $NBLOCK_FENCE' sh '{}' \
         || exit; done",
        super::NBLOCK,
        counter.display()
    );
    let mut loops: Vec<_> = (0..4)
        .map(|_| {
            let mut command = store.command("sh");
            command.args(["-c", &script]);
            Running::start(command)
        })
        .collect();
    let mut fences = Vec::new();
    for running in &mut loops {
        assert!(running.wait().success(), "{:?}", running.err.rest());
        let own: Vec<u64> = running.out.rest().iter().map(|line| line.parse().unwrap()).collect();
        assert!(own.is_sorted(), "{own:?}");
        fences.extend(own);
    }
    assert_eq!(std::fs::read_to_string(&counter).unwrap().trim(), "48");
    fences.sort_unstable();
    fences.dedup();
    assert_eq!(fences.len(), 48, "each grant has a fence of its own");
}

#[test]
fn the_command_knows_its_key_and_has_our_environment() {
    let store = Store::new();
    let mut command =
        store.nblock(&["run", "a key: ü", "--", "sh", "-c", "echo \"$NBLOCK_KEY|$NBLOCK_FENCE|$OURS\"; env"]);
    command.env("OURS", "yes").env("NBLOCK_KEY", "another").env("NBLOCK_FENCE", "another");
    let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let first: Vec<_> = said.lines().next().unwrap().split('|').collect();
    assert_eq!((first[0], first[2]), ("a key: ü", "yes"));
    assert!(first[1].parse::<u64>().unwrap() > 0);
    assert_eq!(said.lines().filter(|line| line.starts_with("NBLOCK_KEY=")).count(), 1);
    let fence = |options: &[&str]| {
        let mut arguments = vec!["run", "--url", "memory:"];
        arguments.extend(options);
        arguments.extend(["k", "--", "sh", "-c", "echo ${NBLOCK_FENCE-none}"]);
        store.said(&arguments)
    };
    for options in [&["--fence"][..], &[]] {
        assert!(fence(options).trim().parse::<u64>().is_ok(), "{options:?}");
    }
}

#[test]
fn a_store_that_excludes_no_other_command_is_warned_of() {
    let store = Store::new();
    let warning = "nblock: the store memory: is inside this process, and excludes no other command";
    status(&store, &["run", "--url", "memory:", "k", "--", "true"], 0, warning);
    status(&store, &["run", "--url", "memory:name", "k", "--", "true"], 0, warning);
    let quiet = store.run(&["run", "k", "--", "true"]);
    assert!(quiet.status.success() && quiet.stderr.is_empty(), "{quiet:?}");
}

#[test]
fn input_output_and_open_descriptors_are_the_commands() {
    let store = Store::new();
    let mut command = store.command("sh");
    // Of what the command has open, only what it has without us.
    let script = format!(
        "exec 7</dev/null; {} run k -- sh -c 'cat; ls /proc/$$/fd'; echo without; sh -c 'ls /proc/$$/fd'",
        super::NBLOCK
    );
    command.args(["-c", &script]);
    let mut running = Running::start(command);
    running.process.stdin.as_mut().unwrap().write_all(b"through\n").unwrap();
    assert!(running.finish().success());
    let said = running.out.rest();
    let without = said.iter().position(|line| line == "without").unwrap();
    assert_eq!(said[0], "through");
    assert_eq!(said[1..without], said[without + 1..]);
    assert!(said.contains(&"7".to_string()), "{said:?}");
}

#[test]
#[expect(clippy::zombie_processes, reason = "wait4 waits for it, and says what it cost")]
fn a_waiter_costs_next_to_nothing() {
    let store = Store::new();
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let waiter = store.nblock(&["run", "--timeout", "1.5", "k", "--", "true"]).stderr(Stdio::null()).spawn().unwrap();
    let (mut status, mut usage) = (0, unsafe { std::mem::zeroed::<libc::rusage>() });
    let pid = unsafe { libc::wait4(waiter.id() as i32, &mut status, 0, &mut usage) };
    assert_eq!((pid, libc::WEXITSTATUS(status)), (waiter.id() as i32, 75));
    let micros = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
    let spent = micros(usage.ru_utime) + micros(usage.ru_stime);
    // Its start, mostly. A process that polls or spins for 1.5 s spends much more.
    assert!(spent < 400_000, "{spent} µs");
    holder.finish();
}

#[test]
fn a_free_lock_and_a_short_command_take_no_threads() {
    let store = Store::new();
    assert_eq!(store.said(&["run", "k", "--", "sh", "-c", "ls /proc/$PPID/task | wc -l"]).trim(), "1");
    // Renewed at a third of its lease, and so with threads from then on.
    let renewed = "until test $(ls /proc/$PPID/task | wc -l) -gt 1; do sleep 0.01; done";
    store.said(&["run", "--expire", "3", "k", "--", "sh", "-c", renewed]);
}

#[test]
fn nothing_secret_stays_in_the_process_list() {
    let store = Store::new();
    let said = store.said(&["run", "any://user:hunter2@host", "--", "sh", "-c", "tr '\\0' ' ' </proc/$PPID/cmdline"]);
    assert!(said.contains("any://user:*******@host"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[test]
fn on_a_server() {
    let Some(url) = std::env::var("NBLOCK_TEST_RETHINKDB_URL").ok().filter(|url| !url.is_empty()) else {
        println!("SKIPPED command-rethinkdb: NBLOCK_TEST_RETHINKDB_URL is not set");
        return;
    };
    let store = Store::new();
    let key = format!("command {}", std::process::id());
    let nblock = |arguments: &[&str]| {
        let mut command = store.nblock(arguments);
        command.env("NBLOCK_URL", &url);
        command
    };
    let script = "echo ${NBLOCK_FENCE-none}; read x; exit 5";
    let mut holder = Running::start(nblock(&["run", &key, "--", "sh", "-c", script]));
    holder.out.expect("none");
    assert_eq!(nblock(&["run", "--no-wait", &key, "--", "true"]).output().unwrap().status.code(), Some(75));
    let waiting = ["run", "--wait", "--fence", &key, "--", "sh", "-c", "echo $NBLOCK_FENCE; exec sleep 1000"];
    let mut interrupted = nblock(&waiting);
    interrupted.env("NBLOCK_LOG", "info");
    let mut interrupted = Running::start(interrupted);
    interrupted.err.expect_part("the store is");
    interrupted.signal(libc::SIGTERM);
    assert_eq!(interrupted.status(), Some(128 + libc::SIGTERM));

    let mut next = Running::start(nblock(&waiting));
    assert_eq!(holder.finish().code(), Some(5));
    assert!(next.out.next().unwrap().parse::<u64>().unwrap() > 0, "a fence that was asked for");
    let shown = nblock(&["show", "--json", &key]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["owner"]["pid"], next.pid());
    next.signal(libc::SIGINT);
    assert_eq!(next.status(), Some(128 + libc::SIGINT));
    assert_eq!(nblock(&["show", &key]).output().unwrap().status.code(), Some(1), "nothing is left of it");
}
