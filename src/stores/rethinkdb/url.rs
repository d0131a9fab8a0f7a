//! What a `rethinkdb://` URL says, and what NoBrainer's environment says instead.

use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::key::Excerpt;
use crate::store::StoreOptions;
use crate::stores::network::address::Address;
use crate::stores::network::options::{self, wrong};
use crate::stores::network::secret::Secret;
use crate::stores::network::tls::Tls;
use crate::url::Url;

/// The port of a RethinkDB server's clients (RethinkDB src/config/args.hpp: DEFAULT_REQL_PORT).
pub const DEFAULT_PORT: u16 = 28015;

/// NoBrainer's table of locks (lib/no_brainer/lock.rb: `table_config`).
const DEFAULT_TABLE: &str = "nobrainer_locks";

/// How far the clocks of two servers of one cluster may be apart, unless the URL says otherwise.
const DEFAULT_SKEW: Duration = Duration::from_millis(250);

const OPTIONS: &[&str] = &["tls", "ca", "cert", "key", "table", "durability", "read_mode", "skew", "create"];

/// Everything that a store needs to know before it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub hosts: Vec<Address>,
    pub user: String,
    pub password: Secret,
    pub database: String,
    pub table: String,
    /// `None`: a plain connection.
    pub tls: Option<Tls>,
    /// RethinkDB's words for it: `hard` or `soft`.
    pub durability: &'static str,
    /// RethinkDB's words for it: `single`, `majority` or `outdated`. Of listing and finding only.
    pub read_mode: &'static str,
    pub skew: Duration,
    /// Whether a database that is not there is created.
    pub create: bool,
    pub op_timeout: Duration,
    pub connect_timeout: Duration,
}

/// Where the store is, for people: never with an account.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(Address::to_string).collect();
        write!(f, "rethinkdb://{}/{} (table {})", hosts.join(","), self.database, self.table)
    }
}

impl Config {
    pub fn from_url(url: &Url, given: &StoreOptions) -> Result<Config, Error> {
        url.only_options(OPTIONS)?;
        if url.hosts.is_empty() {
            return Err(wrong("has no host: write rethinkdb://host/database"));
        }
        let path = url.path.trim_end_matches('/');
        if path.is_empty() {
            return Err(wrong("has no database: write rethinkdb://host/database"));
        }
        let database = name_of("database", path)?;
        let table = name_of("table", url.option("table").unwrap_or(DEFAULT_TABLE))?;
        Ok(Config {
            hosts: url.hosts.iter().map(|host| Address::of(host, DEFAULT_PORT)).collect(),
            // RethinkDB's own account, which has no password until it is given one.
            user: url.user.clone().unwrap_or_else(|| "admin".to_string()),
            password: Secret(url.password.clone().unwrap_or_default()),
            database,
            table,
            tls: options::tls(url)?,
            durability: options::one_of(url, "durability", &["hard", "soft"])?,
            read_mode: options::one_of(url, "read_mode", &["single", "majority", "outdated"])?,
            skew: options::milliseconds(url, "skew")?.unwrap_or(DEFAULT_SKEW),
            create: options::switch(url, "create")?.unwrap_or(false),
            op_timeout: given.op_timeout,
            connect_timeout: given.connect_timeout,
        })
    }
}

/// A name as RethinkDB allows it (src/rpc/semilattice/joins/... name_string_t: letters, digits, _ and -).
fn name_of(what: &str, name: &str) -> Result<String, Error> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    if name.is_empty() || !name.bytes().all(allowed) {
        return Err(wrong(format!("has the {what} {:?}: must be letters, digits, _ and - only", Excerpt(name))));
    }
    Ok(name.to_string())
}

/// The URL that NoBrainer would use in this environment, if it names a database.
///
/// As its `default_rethinkdb_url` reads it (lib/no_brainer/config.rb): `RETHINKDB_URL`, else one put
/// together from `RETHINKDB_HOST`, `_PORT`, `_DB`, `_USER` and `_PASSWORD` (or `_AUTH`), each also as
/// `RDB_...`. Never shows a password in its errors.
pub fn from_nobrainers_environment(variable: impl Fn(&str) -> Option<String>) -> Option<Result<Url, Error>> {
    // What is set but empty counts as unset.
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let either = |name: &str| variable(&format!("RETHINKDB_{name}")).or_else(|| variable(&format!("RDB_{name}")));
    if let Some(url) = either("URL") {
        return Some(parse_as_ruby_does(&url));
    }
    let database = either("DB")?;
    let host = either("HOST").unwrap_or_else(|| "localhost".to_string());
    let port = either("PORT").map(|port| format!(":{port}")).unwrap_or_default();
    let password = ["RETHINKDB_PASSWORD", "RDB_PASSWORD", "RETHINKDB_AUTH", "RDB_AUTH"].into_iter().find_map(variable);
    let account = match (either("USER"), password) {
        (None, None) => String::new(),
        (user, password) => format!("{}:{}@", user.unwrap_or_default(), password.unwrap_or_default()),
    };
    Some(parse_as_ruby_does(&format!("rethinkdb://{account}{host}{port}/{database}")))
}

/// NoBrainer unescapes user and password with `CGI.unescape` (lib/no_brainer/connection.rb), to which
/// a plus is a space.
fn parse_as_ruby_does(text: &str) -> Result<Url, Error> {
    let end = text.find("://").map_or(0, |scheme| {
        let authority = &text[scheme + 3..];
        let authority = &authority[..authority.find('/').unwrap_or(authority.len())];
        authority.rfind('@').map_or(0, |at| scheme + 3 + at)
    });
    Url::parse(&format!("{}{}", text[..end].replace('+', "%20"), &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::network::tls::{Check, OptionNames};
    use std::collections::HashMap;

    fn config(text: &str) -> Result<Config, Error> {
        let options = StoreOptions { op_timeout: Duration::from_secs(5), connect_timeout: Duration::from_secs(5) };
        Config::from_url(&Url::parse(text)?, &options)
    }

    #[test]
    fn defaults_are_nobrainers() {
        let config = config("rethinkdb://localhost/app").unwrap();
        assert_eq!(config.hosts, [Address::Tcp { host: "localhost".into(), port: 28015 }]);
        assert_eq!((config.user.as_str(), config.password.0.as_str()), ("admin", ""));
        assert_eq!((config.database.as_str(), config.table.as_str()), ("app", "nobrainer_locks"));
        assert_eq!((config.durability, config.read_mode, config.create), ("hard", "single", false));
        assert_eq!((config.tls, config.skew), (None, Duration::from_millis(250)));
    }

    #[test]
    fn all_options() {
        let url = "rethinkdb://al:p%40ss@a,[::1]:2/app?ca=/c&cert=/x&key=/y&durability=soft&table=t&skew=1s&create=1&read_mode=majority";
        let config = config(url).unwrap();
        assert_eq!(config.hosts.iter().map(Address::to_string).collect::<Vec<_>>(), ["a:28015", "[::1]:2"]);
        assert_eq!((config.user.as_str(), config.password.0.as_str()), ("al", "p@ss"));
        let identity = Some(("/x".into(), "/y".into()));
        let tls = Tls { ca: Some("/c".into()), identity, names: OptionNames::USUAL, check: Check::Name };
        assert_eq!(config.tls, Some(tls));
        assert_eq!((config.durability, config.table.as_str(), config.create), ("soft", "t", true));
        assert_eq!((config.skew, config.read_mode), (Duration::from_secs(1), "majority"));
        assert!(!format!("{config:?}").contains("p@ss"));
    }

    #[test]
    fn refuses_in_words() {
        for (url, part) in [
            ("rethinkdb:app", "no host"),
            ("rethinkdb://h", "no database"),
            ("rethinkdb://h/", "no database"),
            ("rethinkdb://h/a.b", "letters, digits"),
            ("rethinkdb://h/a/b", "letters, digits"),
            ("rethinkdb://h/a?table=x y", "letters, digits"),
            ("rethinkdb://h/a?durability=firm", "hard or soft"),
            ("rethinkdb://h/a?skew=1h", "milliseconds"),
            ("rethinkdb://h/a?skew=99999999s", "milliseconds"),
            ("rethinkdb://h/a?tls=maybe", "1 or 0"),
            ("rethinkdb://h/a?cert=/x", "needs both"),
            ("rethinkdb://h/a?tls=0&ca=/x", "tls=0"),
            ("rethinkdb://h/a?tsl=1", "\"tsl\""),
        ] {
            let error = config(url).unwrap_err();
            assert!(error.message().contains(part), "{url}: {error}");
        }
    }

    #[test]
    fn nobrainers_environment() {
        let url = |pairs: &[(&str, &str)]| {
            let pairs: HashMap<&str, &str> = pairs.iter().copied().collect();
            from_nobrainers_environment(|name| pairs.get(name).map(|value| value.to_string())).map(Result::unwrap)
        };
        assert_eq!(url(&[]), None);
        assert_eq!(url(&[("RDB_HOST", "h")]), None, "NoBrainer needs a database as well");
        let empty = url(&[("RETHINKDB_URL", ""), ("RETHINKDB_DB", ""), ("RDB_DB", "d"), ("RDB_HOST", "")]).unwrap();
        assert_eq!((empty.path.as_str(), empty.hosts[0].name.as_str()), ("d", "localhost"), "empty is unset");
        assert_eq!(url(&[("RETHINKDB_URL", ""), ("RDB_DB", "")]), None);
        let full = url(&[
            ("RETHINKDB_DB", "d"),
            ("RDB_DB", "not this one"),
            ("RDB_HOST", "h"),
            ("RDB_PORT", "7"),
            ("RDB_USER", "u"),
            ("RDB_AUTH", "a+b%40"),
        ])
        .unwrap();
        assert_eq!((full.path.as_str(), full.hosts[0].name.as_str(), full.hosts[0].port), ("d", "h", Some(7)));
        assert_eq!((full.user.as_deref(), full.password.as_deref()), (Some("u"), Some("a b@")));
        let plain = url(&[("RDB_DB", "d")]).unwrap();
        assert_eq!((plain.hosts[0].name.as_str(), plain.user), ("localhost", None));
        let only_password = url(&[("RDB_DB", "d"), ("RETHINKDB_PASSWORD", "s")]).unwrap();
        assert_eq!((only_password.user, only_password.password.as_deref()), (None, Some("s")));
        let whole = url(&[("RETHINKDB_URL", "rethinkdb://x+y:z@h/d"), ("RETHINKDB_DB", "other")]).unwrap();
        assert_eq!((whole.user.as_deref(), whole.path.as_str()), (Some("x y"), "d"));
    }
}
