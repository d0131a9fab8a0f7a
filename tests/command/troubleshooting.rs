//! What `docs/troubleshooting.md` shows is run, on a machine of its own: users, `/etc`, `/var/tmp` and mounts that are
//! no other program's. `sudo` and `systemd-run` are stand-ins that do what the page uses them for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::NBLOCK;

const PAGE: &str = "docs/troubleshooting.md";

/// What is typed in one block, by whom, and what is printed.
struct Typed {
    user: &'static str,
    command: String,
    /// `...` stands for any text, and alone on a line for any lines.
    printed: Vec<String>,
}

enum Block {
    /// A file to be written into root's directory, and its text.
    File(String, String),
    Console(Vec<Typed>),
}

struct Section {
    title: String,
    blocks: Vec<Block>,
}

/// The sections of the page that have something to run.
fn sections(page: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            sections.push(Section { title: title.to_string(), blocks: Vec::new() });
        }
        let Some(kind) = line.strip_prefix("```").filter(|kind| !kind.is_empty()) else { continue };
        let text: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let block = match kind.split_once(' ') {
            Some((_, name)) => Block::File(name.to_string(), text.join("\n") + "\n"),
            None if kind == "console" => Block::Console(typed(&text)),
            None => continue,
        };
        sections.last_mut().expect("blocks stand in sections").blocks.push(block);
    }
    sections.retain(|section| !section.blocks.is_empty());
    sections
}

fn typed(lines: &[&str]) -> Vec<Typed> {
    let mut all: Vec<Typed> = Vec::new();
    for line in lines {
        let prompts = [("# ", "root"), ("alice$ ", "alice"), ("bob$ ", "bob")];
        if let Some((command, user)) =
            prompts.iter().find_map(|(prompt, user)| line.strip_prefix(prompt).map(|command| (command, *user)))
        {
            all.push(Typed { user, command: command.to_string(), printed: Vec::new() });
            continue;
        }
        let last = all.last_mut().expect("a block begins with what is typed");
        match line.strip_prefix("> ") {
            Some(more) => last.command = format!("{}\n{more}", last.command),
            None => last.printed.push((*line).to_string()),
        }
    }
    all
}

/// Whether a text is as it is shown.
fn is_as_shown(text: &str, shown: &str) -> bool {
    let parts: Vec<&str> = shown.split("...").collect();
    let (Some((first, after)), Some(rest)) = (parts.split_first(), text.strip_prefix(parts[0])) else { return false };
    let Some((last, between)) = after.split_last() else { return text == *first };
    let mut rest = rest;
    for part in between {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

fn are_as_shown(lines: &[&str], shown: &[String]) -> bool {
    match shown.split_first() {
        None => lines.is_empty(),
        Some((any, after)) if any == "..." => (0..=lines.len()).any(|from| are_as_shown(&lines[from..], after)),
        Some((first, after)) => {
            lines.split_first().is_some_and(|(line, rest)| is_as_shown(line, first) && are_as_shown(rest, after))
        }
    }
}

/// A directory of this test's own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("nblock-machine-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("root")).unwrap();
        fs::create_dir_all(path.join("commands")).unwrap();
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a section on a machine of its own.
fn run(section: &Section) {
    let scratch = Scratch::new();
    let commands = scratch.0.join("commands");
    let (mut number, mut expected) = (0, Vec::new());
    let mut put = |user: &str, command: &str| {
        number += 1;
        let path = commands.join(format!("{number:03}"));
        fs::write(&path, command).unwrap();
        fs::write(path.with_extension("user"), user).unwrap();
        path.with_extension("out")
    };
    for block in &section.blocks {
        match block {
            Block::File(name, text) => {
                let path = commands.join(name);
                fs::write(path, text).unwrap();
                put("root", &format!("cp /commands/{name} ."));
            }
            Block::Console(all) => {
                for typed in all {
                    expected.push((put(typed.user, &typed.command), typed));
                }
            }
        }
    }
    let here = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    // Tests link the library's Rust form; the C library beside the command has to be built by itself.
    let built = Command::new(env!("CARGO")).args(["build", "--quiet", "--lib"]).current_dir(here).status().unwrap();
    assert!(built.success());
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(here.join("tests/command/machine/enter.sh"))
        .args([&scratch.0.join("root"), &commands])
        .arg(NBLOCK)
        .arg(Path::new(NBLOCK).with_file_name("libnblock.so"))
        .arg(here.join("include"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}: no machine: {output:?}", section.title);
    for (path, typed) in expected {
        let printed = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", typed.command));
        let lines: Vec<_> = printed.lines().collect();
        assert!(
            are_as_shown(&lines, &typed.printed),
            "{}: {}\nprinted:\n{printed}\nand the page shows:\n{}",
            section.title,
            typed.command,
            typed.printed.join("\n")
        );
    }
}

#[test]
fn what_the_page_shows_is_what_happens() {
    let possible = Command::new("unshare").args(["--mount", "true"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        println!("\nSKIPPED troubleshooting: no mount namespace is available here (root may)");
        return;
    }
    let page = fs::read_to_string(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(PAGE)).unwrap();
    let sections = sections(&page);
    assert!(sections.len() >= 8, "the page has what it had");
    for section in &sections {
        run(section);
    }
}

#[test]
fn what_is_shown_is_compared() {
    let shown = |text: &str| text.lines().map(str::to_string).collect::<Vec<_>>();
    assert!(are_as_shown(&["a 1 b", "x", "y", "z"], &shown("a ... b\n...\nz")));
    assert!(are_as_shown(&[], &shown("")));
    assert!(!are_as_shown(&["a 1 c"], &shown("a ... b")));
    assert!(!are_as_shown(&["a", "b"], &shown("a")));
    assert!(!are_as_shown(&["a"], &shown("a\nb")));
    assert!(is_as_shown("abc", "abc") && is_as_shown("abc", "a...") && !is_as_shown("abc", "...b"));
}
