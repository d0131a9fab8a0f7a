//! What `redis://`, `rediss://`, `valkey://`, `redis+unix:` and `redis+sentinel://` URLs say.

use std::fmt;
use std::time::Duration;

use crate::error::Error;
use crate::key::Excerpt;
use crate::store::StoreOptions;
use crate::stores::network::address::Address;
use crate::stores::network::options::{self, wrong};
use crate::stores::network::secret::Secret;
use crate::stores::network::tls::{OptionNames, Tls};
use crate::url::{Host, Url};

pub const SCHEMES: &[&str] = &[
    "redis",
    "rediss",
    "valkey",
    "valkeys",
    "redis+unix",
    "valkey+unix",
    "redis+sentinel",
    "rediss+sentinel",
    "valkey+sentinel",
    "valkeys+sentinel",
];

const DEFAULT_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// How far two servers' clocks may be apart where a failover can put one in the other's place.
const SKEW_OF_SEVERAL: Duration = Duration::from_millis(250);

/// The longest time between two looks of a waiter that nothing tells of changes (R10).
const DEFAULT_POLL: Duration = Duration::from_secs(1);

const OPTIONS: &[&str] =
    &["tls", "ca", "cert", "key", "db", "prefix", "skew", "poll", "notify", "sentinel_user", "sentinel_password"];

/// What other libraries read in the same URL, and what means nothing here.
const OTHERS: &[&str] = &[
    "pool",
    "timeout",
    "protocol",
    "max_connections",
    "socket_timeout",
    "socket_connect_timeout",
    "socket_keepalive",
    "retry_on_timeout",
    "health_check_interval",
    "decode_responses",
    "encoding",
    "client_name",
    "driver",
    "reconnect_attempts",
];

/// Everything that a store needs to know before it connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The servers, or the sentinels that know them.
    pub hosts: Vec<Address>,
    pub sentinel: Option<Sentinel>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub database: u32,
    pub prefix: String,
    /// `None`: a plain connection.
    pub tls: Option<Tls>,
    pub skew: Duration,
    pub poll: Duration,
    /// Whether waiters are notified of changes, where the server can.
    pub notify: bool,
    pub op_timeout: Duration,
    pub connect_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentinel {
    /// What the sentinels call the primary and its replicas.
    pub name: String,
    pub user: Option<String>,
    pub password: Option<Secret>,
}

/// Where the store is, for people: never with an account.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts: Vec<String> = self.hosts.iter().map(Address::to_string).collect();
        let hosts = hosts.join(",");
        match (&self.sentinel, self.hosts.first()) {
            (Some(sentinel), _) => write!(f, "redis+sentinel://{hosts}/{}", sentinel.name)?,
            (None, Some(Address::Unix(path))) => write!(f, "redis+unix:{}", path.display())?,
            (None, _) => write!(f, "redis://{hosts}")?,
        }
        write!(f, " (database {}", self.database)?;
        if !self.prefix.is_empty() {
            write!(f, ", prefix {:?}", Excerpt(&self.prefix))?;
        }
        f.write_str(")")
    }
}

impl Config {
    pub fn from_url(url: &Url, given: &StoreOptions) -> Result<Config, Error> {
        let mut url = url.clone();
        url.options.retain(|(name, _)| {
            let known = !OTHERS.contains(&name.as_str());
            if !known {
                tracing::info!("the store URL's option {name}= is for another library, and is ignored");
            }
            known
        });
        url.only_options(OPTIONS)?;
        let (base, kind) = url.scheme.split_once('+').unwrap_or((&url.scheme, ""));
        if base.ends_with('s') && base != "redis" {
            // `rediss` is asking for TLS.
            if options::switch(&url, "tls")? == Some(false) {
                return Err(wrong(format!(
                    "has tls=0 together with {}:, which asks for TLS: remove tls=0, or change the \
                     scheme",
                    url.scheme
                )));
            }
            url.options.push(("tls".to_string(), "1".to_string()));
        }
        let mut tls = options::tls(&url)?;
        if let Some(tls) = &mut tls {
            tls.names = OptionNames { tls: "rediss: (or tls=1)", ..OptionNames::USUAL };
        }
        let mut sentinel = None;
        let mut database = None;
        let path = url.path.trim_end_matches('/');
        let hosts = match kind {
            "unix" => {
                if tls.is_some() {
                    return Err(wrong("asks for TLS on a Unix socket: remove the TLS options"));
                }
                if !url.hosts.is_empty() || path.is_empty() {
                    return Err(wrong("has no socket path: write redis+unix:/path/of/the.sock"));
                }
                vec![Address::Unix(format!("/{}", path.trim_start_matches('/')).into())]
            }
            "sentinel" => {
                let (name, rest) = path.split_once('/').unwrap_or((path, ""));
                if name.is_empty() {
                    return Err(wrong("has no primary: write redis+sentinel://host1,host2/NAME"));
                }
                sentinel = Some(Sentinel {
                    name: name.to_string(),
                    user: url.option("sentinel_user").map(str::to_string),
                    password: url.option("sentinel_password").map(|password| Secret(password.to_string())),
                });
                database = Some(rest).filter(|rest| !rest.is_empty());
                addresses(&url.hosts, SENTINEL_PORT)
            }
            _ => {
                database = Some(path).filter(|path| !path.is_empty());
                addresses(&url.hosts, DEFAULT_PORT)
            }
        };
        if hosts.is_empty() {
            return Err(wrong(format!("has no host: write {}://host", url.scheme)));
        }
        if database.is_some() && url.option("db").is_some() {
            return Err(wrong("names the database twice, in its path and as db=: remove one of them"));
        }
        let database = match database.or(url.option("db")) {
            None => 0,
            Some(given) => given
                .parse()
                .ok()
                .filter(|_| given.bytes().all(|byte| byte.is_ascii_digit()))
                .ok_or_else(|| wrong(format!("has the database {:?}: must be a number", Excerpt(given))))?,
        };
        let one = sentinel.is_none() && hosts.len() == 1;
        let poll = options::milliseconds(&url, "poll")?.unwrap_or(DEFAULT_POLL);
        if poll < Duration::from_millis(1) {
            return Err(wrong("has poll=0: must be 1 to 60000 milliseconds"));
        }
        Ok(Config {
            hosts,
            sentinel,
            user: url.user.clone(),
            password: url.password.clone().map(Secret),
            database,
            prefix: url.option("prefix").unwrap_or_default().to_string(),
            tls,
            skew: options::milliseconds(&url, "skew")?.unwrap_or(if one { Duration::ZERO } else { SKEW_OF_SEVERAL }),
            poll,
            notify: options::switch(&url, "notify")?.unwrap_or(true),
            op_timeout: given.op_timeout,
            connect_timeout: given.connect_timeout,
        })
    }
}

fn addresses(hosts: &[Host], port: u16) -> Vec<Address> {
    hosts.iter().map(|host| Address::of(host, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, Error> {
        let options = StoreOptions { op_timeout: Duration::from_secs(5), connect_timeout: Duration::from_secs(5) };
        Config::from_url(&Url::parse(text)?, &options)
    }

    #[test]
    fn defaults() {
        for text in ["redis://localhost", "valkey://localhost/", "redis://localhost/0?timeout=5&pool=3"] {
            let config = config(text).unwrap();
            assert_eq!(config.hosts, [Address::Tcp { host: "localhost".into(), port: 6379 }]);
            assert_eq!((config.database, config.prefix.as_str(), config.tls.is_some()), (0, "", false));
            assert_eq!((config.skew, config.poll, config.notify), (Duration::ZERO, DEFAULT_POLL, true));
            assert_eq!((config.user, config.password), (None, None));
        }
    }

    #[test]
    fn all_options() {
        let given = config("rediss://al:p%40ss@a,[::1]:2/5?ca=/c&prefix=app:&skew=1s&poll=200ms&notify=off").unwrap();
        assert_eq!(given.hosts.iter().map(Address::to_string).collect::<Vec<_>>(), ["a:6379", "[::1]:2"]);
        assert_eq!((given.user.as_deref(), given.password.as_ref().unwrap().0.as_str()), (Some("al"), "p@ss"));
        assert_eq!((given.database, given.prefix.as_str()), (5, "app:"));
        assert_eq!(given.tls.as_ref().unwrap().ca, Some("/c".into()));
        assert_eq!((given.skew, given.poll, given.notify), (Duration::from_secs(1), Duration::from_millis(200), false));
        let shown = format!("{given:?} {given}");
        assert!(!shown.contains("p@ss"), "{shown}");
        assert_eq!(config("redis://a,b").unwrap().skew, SKEW_OF_SEVERAL);

        for text in ["redis+unix:/run/r.sock?db=2", "redis+unix:///run/r.sock?db=2"] {
            let unix = config(text).unwrap();
            assert_eq!((unix.hosts, unix.database), (vec![Address::Unix("/run/r.sock".into())], 2));
        }

        let found = config("redis+sentinel://:pw@a,b:5/main/3?sentinel_password=x").unwrap();
        assert_eq!(found.hosts.iter().map(Address::to_string).collect::<Vec<_>>(), ["a:26379", "b:5"]);
        let sentinel = found.sentinel.unwrap();
        assert_eq!((sentinel.name.as_str(), sentinel.password.unwrap().0.as_str()), ("main", "x"));
        assert_eq!((found.database, found.skew), (3, SKEW_OF_SEVERAL));
    }

    #[test]
    fn refuses_in_words() {
        for (url, part) in [
            ("redis:", "no host"),
            ("redis://h/x", "a number"),
            ("redis://h/1?db=1", "twice"),
            ("rediss://h?tls=0", "tls=0"),
            ("redis+unix:", "no socket"),
            ("redis+unix:/x?tls=1", "Unix socket"),
            ("redis+sentinel://h", "no primary"),
            ("redis://h?poll=0", "poll=0"),
            ("redis://h?perfix=x", "\"perfix\""),
            ("redis://h?notify=maybe", "1 or 0"),
        ] {
            let error = config(url).unwrap_err();
            assert!(error.message().contains(part), "{url}: {error}");
        }
    }
}
