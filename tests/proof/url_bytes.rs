//! What must be so for any bytes that are taken for a store URL.

use nblock::url::Url;

/// Parses, or refuses: without a panic, and without showing a password.
pub fn url(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Url::parse(text) {
        Ok(url) => {
            assert!(url.scheme.bytes().all(|byte| byte.is_ascii_lowercase() || b"0123456789+-".contains(&byte)));
            assert!(url.hosts.iter().all(|host| !host.name.is_empty() && host.port != Some(0)));
            if let Some(password) = url.password.as_deref().filter(|password| is_telling(password)) {
                let others = format!("{} {} {:?}", url.scheme, url.path, url.hosts);
                assert!(others.contains(password) || !format!("{url:?}").contains(password), "shown: {password:?}");
            }
        }
        Err(error) => {
            assert!(!error.message().is_empty());
            // What stands between the first `//user:` and the last `@` of the hosts is never repeated.
            if let Some((scheme, rest)) = text.split_once("://")
                && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric())
                && let Some((before, after)) = rest.split('/').next().unwrap_or(rest).rsplit_once('@')
                && let Some((user, password)) = before.split_once(':')
                && is_telling(password)
                && !format!("{user}{after}{}", rest.split_once('/').map_or("", |(_, path)| path)).contains(password)
            {
                assert!(!error.message().contains(password), "{:?} is shown: {error}", password);
            }
        }
    }
}

/// Long enough not to be in a message by chance.
fn is_telling(password: &str) -> bool {
    password.len() >= 8 && password.bytes().all(|byte| byte.is_ascii_alphanumeric())
}
