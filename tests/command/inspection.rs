//! Looking at locks, breaking them, and what the command says of itself.

use std::time::Duration;

use serde_json::Value;

use super::{Running, Store, lease};

#[test]
fn list_and_show() {
    let store = Store::new();
    assert_eq!(store.said(&["list"]), "");
    assert_eq!(store.json(&["list", "--json"]), Value::Array(vec![]));
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let token = lease(&store, "a \u{1b}[2J key", Duration::from_millis(1));
    let expired = super::until(|| store.json(&["list", "--json", "--expired"]).get(0).cloned());

    assert_eq!(expired["key"], "a \u{1b}[2J key");
    assert_eq!(expired["expired"], true);
    assert!(expired["remaining"].as_f64().unwrap() < 0.0);
    let all = store.json(&["list", "--json"]);
    assert_eq!(all.as_array().unwrap().len(), 2, "sorted by key");
    let held = &all[1];
    assert_eq!((&held["key"], &held["expired"]), (&Value::from("k"), &Value::from(false)));
    assert_eq!((&held["owner"]["pid"], &held["owner"]["app"]), (&Value::from(holder.pid()), &Value::from("sh")));
    assert!(held["fence"].as_u64().unwrap() > 0);
    let left = held["remaining"].as_f64().unwrap();
    assert!(left > 0.0 && left <= 60.0);
    assert_eq!(store.json(&["show", "--json", "k"])["fence"], held["fence"]);

    let table = store.said(&["list"]);
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("KEY "));
    assert!(lines[1].starts_with("a \\u{1b}[2J key  ran out "), "{table}");
    assert!(lines[2].starts_with("k ") && lines[2].contains(&format!(":{} sh", holder.pid())), "{table}");
    let shown = store.said(&["show", "k"]);
    assert!(shown.starts_with("key          k\nlease        "), "{shown}");

    for arguments in [&["list"][..], &["list", "--json"], &["show", "a \u{1b}[2J key"], &["show", "--json", "k"]] {
        let said = store.said(arguments);
        assert!(!said.contains(&token) && !said.contains(token.split('.').next().unwrap()), "{said}");
    }
    let output = store.run(&["show", "nobody's"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "nblock: nobody holds \"nobody's\"\n");
    holder.finish();
}

#[test]
fn breaking() {
    let store = Store::new();
    let output = store.run(&["break", "k"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    lease(&store, "k", Duration::from_secs(60));
    let broke = store.said(&["break", "k"]);
    assert!(broke.starts_with("broke \"k\", of ") && broke.contains(" left\n"), "{broke}");
    assert!(store.run(&["run", "--no-wait", "k", "--", "true"]).status.success());

    lease(&store, "held", Duration::from_secs(60));
    lease(&store, "out-1", Duration::from_millis(1));
    lease(&store, "out-2", Duration::from_millis(1));
    super::until(|| (store.json(&["list", "--json", "--expired"]).as_array()?.len() == 2).then_some(()));
    assert_eq!(store.said(&["break", "--expired", "--older-than", "1h"]), "");
    let broke = store.said(&["break", "--expired"]);
    assert_eq!(broke.lines().count(), 2, "{broke}");
    assert!(broke.contains("broke \"out-1\"") && broke.contains("broke \"out-2\""), "{broke}");
    let left = store.json(&["list", "--json"]);
    assert_eq!((left.as_array().unwrap().len(), &left[0]["key"]), (1, &Value::from("held")));
}

/// One damaged record hides no other, and can be broken by its key, which is proven by its hash.
#[test]
fn a_damaged_record_is_listed_and_broken() {
    let store = Store::new();
    lease(&store, "a-damaged-record", Duration::from_secs(60));
    lease(&store, "whole", Duration::from_secs(60));
    let entries = std::fs::read_dir(&store.0).unwrap().map(|entry| entry.unwrap().path());
    let table =
        entries.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("table-")).unwrap();
    let mut bytes = std::fs::read(&table).unwrap();
    let key = b"a-damaged-record";
    let places: Vec<_> = (0..bytes.len() - key.len()).filter(|&at| bytes[at..].starts_with(key)).collect();
    assert!(!places.is_empty());
    // What follows the key is no part of it.
    places.iter().for_each(|&at| bytes[at + key.len()] ^= 1);
    std::fs::write(&table, bytes).unwrap();

    let all = store.json(&["list", "--json"]);
    let keys: Vec<_> = all.as_array().unwrap().iter().map(|record| record["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["a-damaged-record", "whole"]);
    assert_eq!(store.json(&["list", "--json", "--expired"]), Value::Array(vec![]));
    let output = store.run(&["run", "--no-wait", "a-damaged-record", "--", "true"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("damaged"), "{output:?}");
    assert!(store.run(&["break", "--expired"]).status.success());
    assert!(store.run(&["break", "a-damaged-record"]).status.success());
    assert_eq!(store.json(&["list", "--json"]).as_array().unwrap().len(), 1);
    assert!(store.run(&["run", "--no-wait", "a-damaged-record", "--", "true"]).status.success());
}

#[test]
fn breaking_one_hold_and_no_other() {
    let store = Store::new();
    lease(&store, "k", Duration::from_secs(600));
    let seen = store.json(&["show", "--json", "k"]);
    let shown = store.said(&["show", "k"]);
    let (fence, version) = (seen["fence"].to_string(), seen["version"].as_str().unwrap().to_string());
    let owner = format!("{}:{}", seen["owner"]["host"].as_str().unwrap(), seen["owner"]["pid"]);
    for line in [format!("fence        {fence}"), format!("version      {version}"), format!("holder       {owner} ")] {
        assert!(shown.contains(&line), "{line:?} is not in {shown}");
    }
    // What was looked at has ended, and another one has begun.
    let broke = store.said(&["break", "k", "--if-fence", &fence, "--if-owner", &owner, "--if-version", &version]);
    assert!(broke.starts_with("broke \"k\""), "{broke}");
    let mut holder = store.start(&["--expire", "10m"], "echo in; read x");
    holder.out.expect("in");
    for (option, value, says) in [
        ("--if-fence", fence.as_str(), "\"k\" has fence "),
        ("--if-owner", &owner, "\"k\" is held by "),
        ("--if-version", &version, "\"k\" has version "),
    ] {
        let output = store.run(&["break", "k", option, value]);
        assert_eq!(output.status.code(), Some(1), "{option}: {output:?}");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(err.contains(says) && err.contains("nothing was broken"), "{err}");
    }
    for owner in ["4711", "host:", ":1", "host:x"] {
        let output = store.run(&["break", "k", "--if-owner", owner]);
        assert_eq!(output.status.code(), Some(64), "{owner}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("HOST:PID"), "{output:?}");
    }
    assert_eq!(store.run(&["break", "--expired", "--if-fence", "1"]).status.code(), Some(64));
    let owner = format!("{}:{}", seen["owner"]["host"].as_str().unwrap(), holder.pid());
    assert!(store.run(&["break", "k", "--if-owner", &owner]).status.success());
    holder.finish();
}

#[test]
fn some_of_the_locks_in_the_order_that_was_asked_for() {
    let store = Store::new();
    for (key, expire) in [("jobs:b", 900), ("jobs:a", 600), ("jobs:c", 700), ("other", 800)] {
        lease(&store, key, Duration::from_secs(expire));
        // Times of grants are in milliseconds.
        let granted = std::time::Instant::now();
        while granted.elapsed() < Duration::from_millis(5) {
            std::thread::yield_now();
        }
    }
    let keys = |arguments: &[&str]| {
        let mut all = vec!["list", "--json"];
        all.extend(arguments);
        let listed = store.json(&all);
        let keys = listed.as_array().unwrap().iter().map(|record| record["key"].as_str().unwrap().to_string());
        keys.collect::<Vec<_>>()
    };
    assert_eq!(keys(&[]), ["jobs:a", "jobs:b", "jobs:c", "other"]);
    assert_eq!(keys(&["jobs:"]), ["jobs:a", "jobs:b", "jobs:c"]);
    assert_eq!(keys(&["*:?", "--reverse"]), ["jobs:c", "jobs:b", "jobs:a"]);
    assert_eq!(keys(&["--sort", "lease"]), ["jobs:a", "jobs:c", "other", "jobs:b"]);
    assert_eq!(keys(&["--sort", "held", "--reverse", "jobs:"]), ["jobs:c", "jobs:a", "jobs:b"]);
    assert_eq!(keys(&["--sort", "holder"]).len(), 4);
    assert_eq!(keys(&["no such"]), [""; 0]);
    let table = store.said(&["list", "jobs:b"]);
    assert_eq!(table.lines().count(), 2, "{table}");
}

/// Changes what the store's file has of a record, behind the store's back.
fn damage(store: &Store, text: &str, other: &str) {
    use std::os::unix::fs::FileExt as _;
    assert_eq!(text.len(), other.len());
    let files = std::fs::read_dir(&store.0).unwrap().map(|entry| entry.unwrap().path());
    let mut places = 0;
    for path in files.filter(|path| path.is_file()) {
        let bytes = std::fs::read(&path).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        for at in (0..bytes.len().saturating_sub(text.len())).filter(|&at| bytes[at..].starts_with(text.as_bytes())) {
            file.write_all_at(other.as_bytes(), at as u64).unwrap();
            places += 1;
        }
    }
    assert!(places > 0, "{text} is nowhere in the store's files");
}

#[test]
fn one_damaged_record_is_shown_and_broken_and_the_others_listed() {
    let store = Store::new();
    let keep = store.client(Duration::from_secs(20));
    for key in ["fine", "the-first-damaged-one", "the-second-damaged-one"] {
        lease(&store, key, Duration::from_secs(600));
    }
    lease(&store, "out", Duration::from_millis(1));
    super::until(|| (store.json(&["list", "--json", "--expired"]).as_array()?.len() == 1).then_some(()));
    damage(&store, "the-first-damaged-one", "the-first-DAMAGED-one");
    damage(&store, "the-second-damaged-one", "the-second-DAMAGED-one");

    let all = store.json(&["list", "--json", "--sort", "lease"]);
    let all = all.as_array().unwrap();
    let damaged: Vec<_> = all.iter().take_while(|record| record["damaged"].is_string()).collect();
    assert_eq!((all.len(), damaged.len()), (4, 2), "{all:?}");
    assert!(damaged.iter().all(|record| record["remaining"].is_null() && record["owner"].is_null()), "{all:?}");
    assert_eq!((&all[2]["key"], &all[3]["key"]), (&Value::from("out"), &Value::from("fine")));
    let table = store.said(&["list"]);
    assert_eq!(table.lines().filter(|line| line.contains("  damaged  ")).count(), 2, "{table}");
    assert!(store.said(&["list", "--expired"]).contains("out"));
    let watch = Running::start(store.nblock(&["watch"]));
    watch.out.expect_part("damaged   (key with the hash ");

    // One by its key, and one by what stands for it in the list.
    assert!(store.said(&["show", "the-first-damaged-one"]).contains("\ndamaged      "));
    assert!(store.said(&["break", "the-first-damaged-one"]).ends_with(": damaged\n"));
    let left = store.json(&["list", "--json", "(key"]);
    let stand_in = left[0]["key"].as_str().unwrap();
    assert!(store.said(&["show", stand_in]).contains("\ndamaged      "));
    let version = left[0]["version"].as_str().unwrap();
    assert_eq!(store.run(&["break", "--if-version", "0123456789abcdef", stand_in]).status.code(), Some(1));
    assert!(store.said(&["break", "--if-version", version, stand_in]).ends_with(": damaged\n"));
    assert_eq!(store.said(&["break", "--expired"]).lines().count(), 1);
    assert_eq!(store.json(&["list", "--json"]).as_array().unwrap().len(), 1);
    assert!(store.run(&["run", "--no-wait", "the-first-damaged-one", "--", "true"]).status.success());
    drop(keep);
}

#[test]
fn in_a_pipe_a_key_is_never_cut() {
    let store = Store::new();
    let long = "任".repeat(500);
    lease(&store, &long, Duration::from_secs(600));
    lease(&store, "short", Duration::from_secs(600));
    let table = store.said(&["list"]);
    assert!(table.contains(&format!("\n{long}  ")) || table.contains(&format!("\n{long} ")), "{table}");
    let widest = table.lines().filter(|line| !line.starts_with('任')).map(str::len).max().unwrap();
    assert!(widest < 200, "one long key does not make the table wide: {table}");
}

#[test]
fn ping_says_which_store_and_why() {
    let store = Store::new();
    let report = store.json(&["ping", "--json"]);
    assert_eq!(report["reachable"], true);
    assert_eq!(report["url"], "embedded:");
    assert!(report["location"].as_str().unwrap().contains("NBLOCK_DIR"), "{report}");
    assert!(report["server"].as_str().unwrap().contains("shared memory"), "{report}");
    assert!(report["round_trip_ms"].as_f64().unwrap() > 0.0);
    let said = store.said(&["ping"]);
    assert!(
        said.contains(store.0.to_str().unwrap()) && said.contains("the default: no other store is configured"),
        "{said}"
    );
    let mut command = store.nblock(&["ping"]);
    let url = format!("embedded:{}", store.0.display());
    let said = String::from_utf8(command.env("NBLOCK_URL", &url).output().unwrap().stdout).unwrap();
    assert!(said.contains("from NBLOCK_URL") && said.contains("from the URL"), "{said}");
    assert!(store.said(&["ping", "--url", &url]).contains("given by the caller"));
    assert!(store.said(&["ping", "--url", "memory:"]).contains("\nwarning      this store is inside one process"));
}

#[test]
fn watch_tells_what_comes_and_goes() {
    let store = Store::new();
    let watch = Running::start(store.nblock(&["watch"]));
    let mut holder = store.start(&["--expire", "1m"], "echo in; read x");
    holder.out.expect("in");
    let line = watch.out.expect_part("held      k by ");
    assert!(line.contains(&format!(":{} sh: ", holder.pid())), "{line}");
    holder.finish();
    watch.out.expect_part("free      k");
    lease(&store, "l", Duration::from_millis(1));
    watch.out.expect_part("ran out   l");
}

#[test]
fn the_man_page_and_the_completions() {
    let store = Store::new();
    let page = store.said(&["manual"]);
    assert!(page.contains(".TH NBLOCK 1") && page.contains("EXIT STATUS"), "{page}");
    for (shell, has) in [("bash", "complete -F _nblock"), ("zsh", "#compdef nblock"), ("fish", "complete -c nblock")] {
        let said = store.said(&["completions", shell]);
        assert!(said.contains(has), "{shell}");
        assert!(said.contains("conflict-exit-code"), "{shell}");
    }
    assert_eq!(store.run(&["completions", "cobol"]).status.code(), Some(64));
}

#[test]
fn the_log_goes_to_standard_error() {
    let store = Store::new();
    let output = store.nblock(&["run", "k", "--", "true"]).env("NBLOCK_LOG", "debug").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("nblock: info: the store is"), "{output:?}");
    let output = store.nblock(&["run", "k", "--", "true"]).env("NBLOCK_LOG", "loud").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("\"loud\""), "{output:?}");
}
