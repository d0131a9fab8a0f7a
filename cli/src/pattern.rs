//! Which keys are meant.

/// Keys that begin with a text; or, where it has a `*` or `?`, that match it as a whole. A backslash takes
/// the character after it for itself.
#[derive(Clone, Debug)]
pub struct Pattern {
    parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Any,
    One,
    This(char),
}

impl Pattern {
    pub fn new(text: &str) -> Pattern {
        let mut parts = Vec::new();
        let mut characters = text.chars();
        while let Some(c) = characters.next() {
            parts.push(match c {
                '*' => Part::Any,
                '?' => Part::One,
                '\\' => Part::This(characters.next().unwrap_or('\\')),
                c => Part::This(c),
            });
        }
        if parts.iter().all(|part| matches!(part, Part::This(_))) {
            parts.push(Part::Any);
        }
        Pattern { parts }
    }

    pub fn matches(&self, key: &str) -> bool {
        let parts = &self.parts;
        let (mut at, mut part) = (0, 0);
        // Where to go on when what came after the last `*` does not match: it takes one character more.
        let mut again: Option<(usize, usize)> = None;
        loop {
            let next = key[at..].chars().next();
            match (parts.get(part), next) {
                (Some(Part::Any), _) => {
                    part += 1;
                    if part == parts.len() {
                        return true;
                    }
                    again = Some((part, at));
                    continue;
                }
                (None, None) => return true,
                (Some(Part::One), Some(c)) => (part, at) = (part + 1, at + c.len_utf8()),
                (Some(Part::This(wanted)), Some(c)) if *wanted == c => (part, at) = (part + 1, at + c.len_utf8()),
                _ => {
                    let Some((after, from)) = again else { return false };
                    let Some(skipped) = key[from..].chars().next() else { return false };
                    (part, at) = (after, from + skipped.len_utf8());
                    again = Some((after, at));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    #[test]
    fn a_beginning_or_a_pattern() {
        for (pattern, key, matches) in [
            ("", "anything", true),
            ("jobs:", "jobs:report", true),
            ("jobs:", "my jobs:report", false),
            ("jobs:report", "jobs:", false),
            ("*:report", "jobs:report", true),
            ("*:report", "jobs:report:2", false),
            ("jobs:*:?", "jobs:a:b:c", true),
            ("jobs:*:?", "jobs:a:b:cc", false),
            ("*aab", "aaaab", true),
            ("?", "ü", true),
            ("?", "", false),
            ("*", "", true),
            (r"a\*", "a*b", true),
            (r"a\*", "ab", false),
            (r"a\", r"a\b", true),
            ("задача:*", "задача:отчёт", true),
        ] {
            assert_eq!(Pattern::new(pattern).matches(key), matches, "{pattern:?} {key:?}");
        }
        // Not exponential.
        assert!(!Pattern::new(&"*a".repeat(30)).matches(&format!("{}b", "a".repeat(2000))));
    }
}
