//! Where a server is.

use std::fmt;
use std::path::PathBuf;

use crate::url::Host;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp {
        /// A name or an address, without the brackets of an IPv6 address.
        host: String,
        port: u16,
    },
    Unix(PathBuf),
}

impl Address {
    /// The address of a host in a URL.
    pub fn of(host: &Host, default_port: u16) -> Address {
        Address::Tcp { host: host.name.clone(), port: host.port.unwrap_or(default_port) }
    }
}

/// As it stands in a URL.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}
