//! Options of store URLs that several engines take.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::tls::{Check, OptionNames, Tls};
use crate::error::Error;
use crate::key::Excerpt;
use crate::url::Url;

/// An error about the store URL; `what` goes on after these words.
pub fn wrong(what: impl fmt::Display) -> Error {
    Error::invalid_argument(format!("store URL {what}"))
}

/// A word out of a few; the first of them where the option is not given.
pub fn one_of(url: &Url, option: &'static str, allowed: &[&'static str]) -> Result<&'static str, Error> {
    let Some(given) = url.option(option) else { return Ok(allowed[0]) };
    let word = allowed.iter().find(|word| **word == given).copied();
    word.ok_or_else(|| wrong(format!("has {option}={:?}: must be {}", Excerpt(given), allowed.join(" or "))))
}

/// `1` or `0`, and the words for them. `None`: not given.
pub fn switch(url: &Url, option: &'static str) -> Result<Option<bool>, Error> {
    match url.option(option) {
        None => Ok(None),
        Some("1" | "true" | "yes" | "on") => Ok(Some(true)),
        Some("0" | "false" | "no" | "off") => Ok(Some(false)),
        Some(given) => Err(wrong(format!("has {option}={:?}: must be 1 or 0", Excerpt(given)))),
    }
}

/// A length of time up to a minute: `250`, `250ms` or `1s`. `None`: not given.
pub fn milliseconds(url: &Url, option: &'static str) -> Result<Option<Duration>, Error> {
    let Some(given) = url.option(option) else { return Ok(None) };
    let (digits, unit) = match given.strip_suffix("ms") {
        Some(digits) => (digits, 1),
        None => match given.strip_suffix('s') {
            Some(digits) => (digits, 1000),
            None => (given, 1),
        },
    };
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(unit))
        .filter(|ms| *ms <= 60_000)
        .map(|ms| Some(Duration::from_millis(ms.into())))
        .ok_or_else(|| wrong(format!("has {option}={:?}: must be 0 to 60000 milliseconds", Excerpt(given))))
}

/// `tls=`, `ca=`, `cert=` and `key=`: naming a certificate is asking for TLS. `None`: a plain connection.
pub fn tls(url: &Url) -> Result<Option<Tls>, Error> {
    let wanted = switch(url, "tls")?;
    let path = |option| url.option(option).map(PathBuf::from);
    let identity = match (path("cert"), path("key")) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        _ => return Err(wrong("has only one of cert= and key=: a client certificate needs both")),
    };
    let tls = Tls { ca: path("ca"), identity, names: OptionNames::USUAL, check: Check::Name };
    let names_files = tls.ca.is_some() || tls.identity.is_some();
    match wanted {
        Some(false) if names_files => Err(wrong("has tls=0 together with ca=, cert= or key=: remove one or the other")),
        Some(true) => Ok(Some(tls)),
        None if names_files => Ok(Some(tls)),
        Some(false) | None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(options: &str) -> Url {
        Url::parse(&format!("x://h/?{options}")).unwrap()
    }

    #[test]
    fn words_switches_and_lengths_of_time() {
        assert_eq!(one_of(&url("a=y"), "a", &["x", "y"]).unwrap(), "y");
        assert_eq!(one_of(&url(""), "a", &["x", "y"]).unwrap(), "x");
        assert!(one_of(&url("a=z"), "a", &["x", "y"]).unwrap_err().message().contains("x or y"));
        assert_eq!(switch(&url("a=on"), "a").unwrap(), Some(true));
        assert_eq!(switch(&url("b=on"), "a").unwrap(), None);
        assert!(switch(&url("a="), "a").is_err());
        for (given, ms) in [("250", 250), ("250ms", 250), ("1s", 1000), ("0", 0), ("60s", 60_000)] {
            let read = milliseconds(&url(&format!("a={given}")), "a").unwrap();
            assert_eq!(read, Some(Duration::from_millis(ms)), "{given}");
        }
        for given in ["", "-1", "1m", "61s", "99999999s", "1.5"] {
            assert!(milliseconds(&url(&format!("a={given}")), "a").is_err(), "{given}");
        }
    }

    #[test]
    fn naming_a_certificate_is_asking_for_tls() {
        assert_eq!(tls(&url("")).unwrap(), None);
        assert_eq!(tls(&url("tls=0")).unwrap(), None);
        assert_eq!(tls(&url("tls=1")).unwrap().unwrap().ca, None);
        assert_eq!(tls(&url("ca=/c")).unwrap().unwrap().ca, Some("/c".into()));
        assert!(tls(&url("cert=/c")).is_err());
        assert!(tls(&url("tls=0&ca=/c")).is_err());
    }
}
