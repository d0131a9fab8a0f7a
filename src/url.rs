//! Store URLs: `scheme:path?options` and `scheme://user:password@host:port,host:port/path?options`.

use std::fmt;

use crate::error::Error;
use crate::key::Excerpt;

/// The parts of a store URL, with percent-escapes decoded. Each store interprets them itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    pub scheme: String,
    pub user: Option<String>,
    pub password: Option<String>,
    /// Empty if the URL has no `//`.
    pub hosts: Vec<Host>,
    /// Without the slash after the hosts. If there are no hosts, with its leading slash.
    pub path: String,
    pub options: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Without the brackets of an IPv6 address.
    pub name: String,
    pub port: Option<u16>,
}

impl Url {
    pub fn parse(text: &str) -> Result<Url, Error> {
        // Probably left over from a file or a shell. It would change the directory, database or password.
        if text.chars().any(char::is_control) || text.trim() != text {
            return Err(wrong(
                "store URL has a line break, another control character, or white space at one of its ends: remove it, \
                 or write it as % and two hexadecimal digits (%0A)",
            ));
        }
        let (scheme, rest) = text.split_once(':').ok_or_else(|| {
            // A password always follows a colon. As there is none, the whole text may be shown.
            wrong(format!(
                "store URL {:?} has no scheme: write embedded:, memory:, redis://..., postgres://... or rethinkdb://...",
                Excerpt(text)
            ))
        })?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '+';
        if !scheme.starts_with(|c: char| c.is_ascii_lowercase()) || !scheme.chars().all(plain) {
            return Err(wrong(
                "store URL has an invalid scheme: write embedded:, memory:, redis://..., postgres://... or rethinkdb://...",
            ));
        }
        if let Some(after) = rest.strip_prefix("//")
            && after.find(['/', '?']).is_some_and(|end| after[end..].contains('@'))
        {
            // The text before the @ may be a password with a slash in it, so no part may be shown.
            return Err(wrong(
                "store URL has an @ after its hosts: in a user, a password or an option write / as %2F, ? as %3F and \
                 @ as %40",
            ));
        }
        let (rest, options) = match rest.split_once('?') {
            Some((rest, options)) => (rest, parse_options(options)?),
            None => (rest, Vec::new()),
        };
        let mut url = Url {
            scheme: scheme.to_string(),
            user: None,
            password: None,
            hosts: Vec::new(),
            path: String::new(),
            options,
        };
        let Some(rest) = rest.strip_prefix("//") else {
            url.path = decode(rest, "path")?;
            return Ok(url);
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        url.path = decode(path, "path")?;
        let hosts = match authority.rsplit_once('@') {
            None => authority,
            Some((user, hosts)) => {
                let (user, password) = match user.split_once(':') {
                    Some((user, password)) => (user, Some(decode(password, "password")?)),
                    None => (user, None),
                };
                url.user = (!user.is_empty()).then(|| decode(user, "user")).transpose()?;
                url.password = password;
                hosts
            }
        };
        url.hosts = hosts.split(',').filter(|_| !hosts.is_empty()).map(parse_host).collect::<Result<_, _>>()?;
        Ok(url)
    }

    /// The value of an option. If the option is given twice, the last one counts.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|(given, _)| given == name).map(|(_, value)| value.as_str())
    }

    /// Fails if there is an option that is not in `known`, and names the first.
    pub fn only_options(&self, known: &[&str]) -> Result<(), Error> {
        match self.options.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) if known.is_empty() => {
                Err(wrong(format!("store URL has the unknown option {:?}: {}: takes none", Excerpt(name), self.scheme)))
            }
            Some((name, _)) => Err(wrong(format!(
                "store URL has the unknown option {:?}: {}: takes {}",
                Excerpt(name),
                self.scheme,
                known.join(", ")
            ))),
        }
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::invalid_argument(message)
}

fn parse_options(text: &str) -> Result<Vec<(String, String)>, Error> {
    text.split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let (name, value) = part.split_once('=').ok_or_else(|| {
                wrong(format!("store URL has the option {:?} without a value: write name=value", Excerpt(part)))
            })?;
            Ok((decode(name, "option")?, decode(value, "option")?))
        })
        .collect()
}

fn parse_host(text: &str) -> Result<Host, Error> {
    let (name, port) = match text.strip_prefix('[') {
        Some(bracketed) => {
            let (name, rest) = bracketed
                .split_once(']')
                .ok_or_else(|| wrong("store URL has an IPv6 address without its closing bracket: write [::1]:28015"))?;
            match rest.strip_prefix(':') {
                Some(port) => (name, Some(port)),
                None if rest.is_empty() => (name, None),
                None => {
                    return Err(wrong(format!(
                        "store URL has {:?} after a host: must be a port, such as :28015",
                        Excerpt(rest)
                    )));
                }
            }
        }
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err(wrong("store URL has an IPv6 address without brackets: write [::1]:28015"));
            }
            Some((name, port)) => (name, Some(port)),
            None => (text, None),
        },
    };
    if name.is_empty() {
        return Err(wrong("store URL has an empty host: write a name or an address before each comma"));
    }
    let port = port
        .map(|port| match port.parse::<u16>() {
            Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => Ok(number),
            _ => Err(wrong(format!("store URL has the port {:?}: must be 1 to 65535", Excerpt(port)))),
        })
        .transpose()?;
    Ok(Host { name: decode(name, "host")?, port })
}

fn decode(text: &str, what: &str) -> Result<String, Error> {
    if !text.contains('%') {
        return Ok(text.to_string());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| (byte as char).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => {
                return Err(wrong(format!(
                    "store URL has a % in its {what} without two hexadecimal digits after it: \
                     write %25 for the character %"
                )));
            }
        }
    }
    String::from_utf8(bytes).map_err(|_| {
        wrong(format!(
            "store URL has a {what} that is not UTF-8: write UTF-8, or its \
         bytes as % and two hexadecimal digits"
        ))
    })
}

/// Leaves out the password, and the values of options, which may be secrets too.
impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(Host::to_string).collect();
        write!(f, "{}:", self.scheme)?;
        if !hosts.is_empty() {
            write!(f, "//{}/", hosts.join(","))?;
        }
        f.write_str(&self.path)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracketed = self.name.contains(':');
        match (bracketed, self.port) {
            (true, Some(port)) => write!(f, "[{}]:{port}", self.name),
            (true, None) => write!(f, "[{}]", self.name),
            (false, Some(port)) => write!(f, "{}:{port}", self.name),
            (false, None) => f.write_str(&self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_apart() {
        let url = Url::parse("rethinkdb://al%40x:p%3Aq@a:28015,[::1]:2,b/db?tls=1&ca=%2Fx").unwrap();
        assert_eq!(url.user.as_deref(), Some("al@x"));
        assert_eq!(url.password.as_deref(), Some("p:q"));
        assert_eq!(url.hosts.iter().map(Host::to_string).collect::<Vec<_>>(), ["a:28015", "[::1]:2", "b"]);
        assert_eq!(url.path, "db");
        assert_eq!(url.option("ca"), Some("/x"));
        assert!(url.only_options(&["tls"]).unwrap_err().message().contains("\"ca\""));

        let url = Url::parse("embedded:/var/lib/x?group=ops").unwrap();
        assert_eq!((url.path.as_str(), url.option("group")), ("/var/lib/x", Some("ops")));
        assert_eq!(Url::parse("memory:").unwrap().path, "");
    }

    #[test]
    fn refuses_and_never_shows_a_password() {
        for text in [
            "",
            "rethinkdb://u:hunter2@a/x\n",
            " rethinkdb://u:hunter2@a/x",
            "rethinkdb://u:hunter2\t@a/x",
            "rethinkdb://u:hunter2@a/x\r\n",
            "nothing",
            ":",
            "A:",
            "rethinkdb://u:hunter2@a:0/x",
            "rethinkdb://u:hunter2@:1/x",
            "rethinkdb://u:hunter2@a:1:2/x",
            "rethinkdb://u:hunter2%zz@a/x",
            "rethinkdb://u:hunter2@[::1/x",
            "rethinkdb://u:hunter2@a/x?y",
            "rethinkdb://u:hunter2@a/%ff",
            "hunter2/x:y",
            "rethinkdb://u:hunter2/y@a/x",
            "rethinkdb://u:x?hunter2@a/x",
        ] {
            let error = Url::parse(text).unwrap_err();
            assert!(!error.message().contains("hunter2"), "{text}: {error}");
        }
        let url = Url::parse("rethinkdb://u:hunter2@a/x?z=hunter2").unwrap();
        assert!(!format!("{url:?}").contains("hunter2"));
    }
}
