//! Text from a store as a terminal may show it: others wrote it, in any script, and it may be long.

use std::io::{self, IsTerminal as _};

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

/// The columns of text that is no table's cell, such as a key in a line of its own.
pub const LONG: usize = 200;

/// Text without what a terminal would obey, or not show: that is escaped.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut before = None;
    let mut pair = String::new();
    for c in text.chars() {
        match c {
            ' '..='~' => shown.push(c),
            // They shape the letters of some scripts and join emoji; among Latin letters they only deceive.
            '\u{200c}' | '\u{200d}' if before.is_some_and(|before: char| !before.is_ascii()) => shown.push(c),
            // Behind another character, Debug escapes what cannot be printed, but not marks that belong to it.
            _ if before.is_some() => {
                pair.clear();
                pair.extend(['a', c]);
                shown.extend(pair.escape_debug().skip(1));
            }
            _ => shown.extend(c.escape_debug()),
        }
        before = Some(c);
    }
    shown
}

/// Printable text of at most so many columns: from what is longer, the middle is left out, since names
/// differ at their ends as often as at their beginnings.
pub fn within(text: &str, columns: usize) -> String {
    // Nothing of a key of 1 MiB needs to be looked at but its ends; a character has no column at least.
    const ENOUGH: usize = 4096;
    let ends = if text.len() > 2 * ENOUGH {
        let boundary = |from: usize| (from..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
        let (head, tail) = (boundary(ENOUGH), boundary(text.len() - ENOUGH));
        [printable(&text[..head]), printable(&text[tail..])]
    } else {
        let shown = printable(text);
        if shown.width() <= columns {
            return shown;
        }
        [shown.clone(), shown]
    };
    let room = columns.saturating_sub(1);
    let head = fitting(ends[0].char_indices().map(|(at, c)| (at + c.len_utf8(), c)), room - room / 2);
    let tail = ends[1].len() - fitting(ends[1].char_indices().rev().map(|(at, c)| (ends[1].len() - at, c)), room / 2);
    // A mark at its beginning would go to what stands before it.
    let tail = ends[1][tail..].trim_start_matches(|c: char| c.width() == Some(0));
    format!("{}…{tail}", &ends[0][..head])
}

/// How many bytes fit into so many columns; each character with how far it reaches.
fn fitting(characters: impl Iterator<Item = (usize, char)>, columns: usize) -> usize {
    let (mut used, mut end) = (0, 0);
    for (reach, c) in characters {
        used += c.width().unwrap_or(0);
        if used > columns {
            break;
        }
        end = reach;
    }
    end
}

/// How many columns a text takes.
pub fn width(text: &str) -> usize {
    text.width()
}

/// What standard output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Output {
    /// Lines and columns of the terminal; `None` if it is not a terminal.
    pub size: Option<(usize, usize)>,
    pub colours: bool,
}

impl Output {
    pub fn standard() -> Output {
        if !io::stdout().is_terminal() {
            return Output { size: None, colours: false };
        }
        // SAFETY: the kernel fills in one winsize.
        let (status, size) = unsafe {
            let mut size: libc::winsize = std::mem::zeroed();
            (libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size), size)
        };
        // One that does not say how large it is: as large as it takes.
        let or_all = |length: u16| if status == 0 && length > 0 { length.into() } else { usize::MAX };
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let colours = set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb");
        Output { size: Some((or_all(size.ws_row), or_all(size.ws_col))), colours }
    }

    pub fn columns(&self) -> usize {
        self.size.map_or(usize::MAX, |(_, columns)| columns)
    }

    /// Text in a colour, or other rendition, where there are any.
    pub fn paint(&self, text: &str, colour: Colour) -> String {
        match (self.colours, colour) {
            (false, _) | (_, Colour::None) => text.to_string(),
            (_, Colour::Heading) => format!("\x1b[1m{text}\x1b[0m"),
            (_, Colour::Alarm) => format!("\x1b[31m{text}\x1b[0m"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    None,
    Heading,
    /// What ran out, or is damaged.
    Alarm,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        assert_eq!(printable("jobs:grün \"x\""), "jobs:grün \"x\"");
        assert_eq!(printable("a\u{1b}[2Jb\n\0"), "a\\u{1b}[2Jb\\n\\0");
        assert_eq!(printable("\u{202e}abc\u{a0}"), "\\u{202e}abc\\u{a0}");
        assert_eq!(printable("a\u{200b}b\u{200d}c"), "a\\u{200b}b\\u{200d}c");
    }

    #[test]
    fn every_script_is_shown_as_it_is() {
        for text in ["задача:отчёт", "任务:报告", "e\u{301}tude", "ก็ได้", "משימה:דוח", "می\u{200c}خواهم", "👩\u{200d}🔧"]
        {
            assert_eq!(printable(text), text);
        }
        assert_eq!(printable("\u{301}x"), "\\u{301}x", "a mark with nothing to stand on");
    }

    #[test]
    fn long_text_loses_its_middle() {
        assert_eq!(within("short", 5), "short");
        assert_eq!(within("abcdefghij", 5), "ab…ij");
        assert_eq!(within("abcdefghij", 6), "abc…ij");
        // Two columns each.
        assert_eq!(within("任务报告任务", 7), "任…务");
        assert_eq!(within("任务报告任务", 12), "任务报告任务");
        assert_eq!(within("aaaae\u{301}", 4), "aa…e\u{301}");
        assert_eq!(within("abc", 1), "…");
        let long = format!("begin{}end", "x".repeat(1 << 20));
        assert_eq!(within(&long, 11), "begin…xxend");
        for columns in 1..40 {
            assert!(width(&within("jobs:\u{1b}任务:e\u{301}\u{301}\u{301}:0123456789:тест", columns)) <= columns);
        }
    }
}
