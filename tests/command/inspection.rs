//! Looking at locks, breaking them, and what the command says of itself.

use std::time::Duration;

use nblock::key::Key;
use nblock::options::LockOptions;
use nblock::runtime;
use serde_json::Value;

use super::{Running, Store};

/// Takes a plain lease that nobody renews; the token that must never be seen.
fn lease(store: &Store, key: &str, expire: Duration) -> String {
    let client = store.client(Duration::from_secs(20));
    let lock = client.lock(Key::new(key.as_bytes()).unwrap(), LockOptions::default()).unwrap();
    assert!(runtime::wait(lock.try_lock(LockOptions { expire: Some(expire), ..LockOptions::default() })).unwrap());
    let token = lock.instance_token().unwrap();
    lock.abandon();
    token
}

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
    assert!(expired["expires_in"].as_f64().unwrap() < 0.0);
    let all = store.json(&["list", "--json"]);
    assert_eq!(all.as_array().unwrap().len(), 2, "sorted by key");
    let held = &all[1];
    assert_eq!((&held["key"], &held["expired"]), (&Value::from("k"), &Value::from(false)));
    assert_eq!((&held["owner"]["pid"], &held["owner"]["app"]), (&Value::from(holder.pid()), &Value::from("sh")));
    assert!(held["fence"].as_u64().unwrap() > 0);
    let left = held["expires_in"].as_f64().unwrap();
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
    let data =
        entries.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("data-")).unwrap();
    let mut bytes = std::fs::read(&data).unwrap();
    let key = b"a-damaged-record";
    let places: Vec<_> = (0..bytes.len() - key.len()).filter(|&at| bytes[at..].starts_with(key)).collect();
    assert!(!places.is_empty());
    // What stands before the key is no part of it.
    places.iter().for_each(|&at| bytes[at - 1] ^= 1);
    std::fs::write(&data, bytes).unwrap();

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
fn ping_says_which_store_and_why() {
    let store = Store::new();
    let report = store.json(&["ping", "--json"]);
    assert_eq!(report["reachable"], true);
    assert_eq!(report["url"], "embedded:");
    assert!(report["location"].as_str().unwrap().contains("NBLOCK_DIR"), "{report}");
    assert!(report["server"].as_str().unwrap().contains("LMDB"), "{report}");
    assert!(report["round_trip_ms"].as_f64().unwrap() > 0.0);
    let said = store.said(&["ping"]);
    assert!(said.contains(store.0.to_str().unwrap()) && said.contains("nothing else was named"), "{said}");
    let mut command = store.nblock(&["ping"]);
    let url = format!("embedded:{}", store.0.display());
    let said = String::from_utf8(command.env("NBLOCK_URL", &url).output().unwrap().stdout).unwrap();
    assert!(said.contains("NBLOCK_URL says so") && said.contains("from the URL"), "{said}");
    assert!(store.said(&["ping", "--url", &url]).contains("it was given"));
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
