//! The man page and the shells' completions, from the definition of the command line.

use std::io;

use clap::CommandFactory as _;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::arguments::Arguments;
use crate::failure::{Failure, write_out};

pub fn completions(shell: Shell) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "nblock", &mut text);
    write_out(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

pub fn manual() -> Result<u8, Failure> {
    let page = render().map_err(|error| Failure::system("the man page could not be rendered", &error))?;
    write_out(&page)?;
    Ok(0)
}

/// One page for the command and all that it does.
fn render() -> io::Result<String> {
    let mut command = Arguments::command();
    command.build();
    let man = Man::new(command.clone()).title("NBLOCK").section("1").manual("nblock");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    let mut page = text(page);
    page.push_str(".SH SYNOPSIS\n");
    let subcommands: Vec<_> = command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().collect();
    for sub in &subcommands {
        page.push_str(&usage(sub));
    }
    let mut overview = Vec::new();
    man.render_description_section(&mut overview)?;
    man.render_options_section(&mut overview)?;
    page.push_str(&text(overview));
    for sub in subcommands {
        page.push_str(&format!(".SH \"NBLOCK {}\"\n", sub.get_name().to_uppercase()));
        // What all of them take stands above.
        let man = Man::new(sub.mut_arg("url", |url| url.hide(true)).mut_arg("help", |help| help.hide(true)));
        let mut section = Vec::new();
        man.render_description_section(&mut section)?;
        man.render_options_section(&mut section)?;
        let section = text(section);
        page.push_str(&section.replace(".SH DESCRIPTION\n", "").replace(".SH OPTIONS\n", ".PP\n"));
    }
    page.push_str(NOTES);
    Ok(page)
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A subcommand's line of the synopsis.
fn usage(sub: &clap::Command) -> String {
    let usage = sub.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").replace("\n       ", "\n.br\n").replace('-', "\\-");
    format!("{usage}\n.br\n")
}

const NOTES: &str = r#".SH "EXIT STATUS"
.B nblock run
exits with the status of its command, with 128+N when signal N ended the command, with 126 when the command
cannot be run, and with 127 when it is not found. The other statuses are:
.TP
.B 1
.BR "nblock show" ", " "nblock break" :
there is no such lock, it is not the one that was meant, or it changed meanwhile.
.TP
.B 64
The command line is wrong.
.TP
.B 65
What the store holds is damaged, or it refused the request.
.TP
.B 69
The store could not be reached, or did not answer in time.
.TP
.B 70
An internal error: a bug in nblock.
.TP
.B 71
The system has no processes, memory, descriptors or disk space left.
.TP
.B 74
Standard output is closed, or could not be written.
.TP
.B 75
The lock was not granted in time
.RB ( --conflict-exit-code
says another).
.TP
.B 76
The lock was lost, and the command was killed if that was possible; or it ended just before the loss was noticed.
.TP
.B 77
The store refused the credentials or the permission.
.SH ENVIRONMENT
.TP
.B NBLOCK_URL
The URL of the store, if no
.B --url
is given. A password is better kept here than on the command line.
.TP
.B NBLOCK_DIR
The directory of the embedded store where the URL names none; otherwise what
.I /etc/nblock.conf
says, or
.IR /var/tmp/nblock-UID .
.TP
.B NBLOCK_LOG
What to log on standard error: error, warn, info, debug or trace.
.TP
.BR NBLOCK_KEY ", " NBLOCK_FENCE
Set for the command that
.B nblock run
runs: the key, and the fence where there is one.
.SH SIGNALS
.B nblock run
passes HUP, INT, QUIT, TERM, CONT, WINCH and TSTP on to the command's process group, and USR1 and USR2 to the
command itself. While it still waits for the lock, each of them but CONT, WINCH and TSTP ends it, with status 128+N.
When the command is stopped from the terminal (^Z), nblock stops too; a lease is not renewed meanwhile, and a
command that is still stopped when its lease runs out is killed.
.SH EXAMPLES
.nf
nblock run jobs:report -- ./report.sh
nblock run --no-wait --conflict-exit-code 0 cron:sync -- rsync -a a b
nblock run --wait --expire 5m deploy -- make deploy
nblock list --json | jq -r '.[] | select(.remaining < 0) | .key'
nblock break --expired --older-than 1h
.fi
"#;

#[cfg(test)]
mod tests {
    #[test]
    fn the_definition_is_sound_and_the_page_has_every_part() {
        <super::Arguments as clap::CommandFactory>::command().debug_assert();
        let page = super::render().unwrap();
        for part in ["NBLOCK RUN", "NBLOCK BREAK", "EXIT STATUS", "on\\-lost", "older\\-than"] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("MANUAL"), "what is hidden is not in it");
    }
}
