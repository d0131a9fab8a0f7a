//! What errors of a server mean.

use super::url::Config;
use crate::store::{StoreError, StoreErrorKind};

/// What a user of the store needs, as an ACL says it.
pub const ACL_COMMANDS: &str = "+hello +select +ping +time +client|tracking +client|caching +eval +evalsha +get \
                                +getrange +strlen +set +del +pttl +pexpire +type +scan +info +config|get";

/// How a server says that it does not know a script by its hash. Nothing was applied.
pub fn is_unknown_script(said: &str) -> bool {
    said.starts_with("NOSCRIPT")
}

/// Whether an error has a code: at its beginning, or where an old server's words around a script's error have it.
fn has_code(said: &str, code: &str) -> bool {
    said.match_indices(code).any(|(at, _)| at == 0 || matches!(said.as_bytes()[at - 1], b' ' | b'-' | b':'))
}

/// Whether another server has to be asked, or this one later.
pub fn is_elsewhere(said: &str) -> bool {
    ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK ", "TRYAGAIN"]
        .iter()
        .any(|code| has_code(said, code))
}

/// A server's message without the arguments that it repeats: passwords and tokens are among them.
pub fn without_arguments(said: &str) -> &str {
    said.find("with args beginning with").map_or(said, |at| said[..at].trim_end_matches([' ', ',']))
}

/// The error that a server's words are. `of`: what they are about, such as `the key "jobs"`.
///
/// Scripts put words of their own around an error: before it until Redis 6, behind it since. Each of ours writes its
/// counter before its record, so an error says that nothing was granted.
pub fn error(said: &str, of: &str, config: &Config) -> StoreError {
    let said = without_arguments(said);
    let has = |code: &str| has_code(said, code);
    let user = config.user.as_deref().unwrap_or("default");
    if has("WRONGTYPE") {
        return StoreError::rejected(format!(
            "{of} is not a string: it is not a lock, or is another library's lock, and is left alone"
        ));
    }
    if is_elsewhere(said) {
        return StoreError::unreachable(format!("the server cannot do this now: {said}"));
    }
    if has("NOREPLICAS") {
        return StoreError::unreachable(format!("the server has too few replicas to write: {said}"));
    }
    if has("BUSY ") {
        return StoreError::unreachable(format!("the server is busy with a script: {said}"));
    }
    if has("OOM ") {
        return StoreError::resources(format!(
            "{of} cannot be written: the server's memory is full (maxmemory). Free some, or raise maxmemory: {said}"
        ));
    }
    if has("MISCONF") {
        return StoreError::resources(format!("{of} cannot be written: the server cannot save its data: {said}"));
    }
    if has("NOPERM") || said.contains("user executing the script") {
        return StoreError::new(
            StoreErrorKind::Denied,
            format!(
                "{of}: {said}. The user needs commands and keys: ACL SETUSER {user} {ACL_COMMANDS} ~{}*",
                config.prefix
            ),
        );
    }
    if has("NOAUTH") {
        let user = config.user.as_deref().unwrap_or("user");
        return StoreError::new(
            StoreErrorKind::Denied,
            format!("the server requires a password: write {user}:password@ before the host in the store URL ({said})"),
        );
    }
    if has("WRONGPASS") || said.contains("invalid password") || said.contains("without any password configured") {
        let with = if config.password.is_some() { "with the password given" } else { "without a password" };
        return StoreError::new(StoreErrorKind::Denied, format!("user {user:?} was denied access {with}: {said}"));
    }
    if said.starts_with("DENIED") {
        return StoreError::new(
            StoreErrorKind::Denied,
            format!(
                "the server accepts no connections from this host: \
             {said}"
            ),
        );
    }
    if said.contains("max number of clients") {
        return StoreError::unreachable(format!(
            "the server has reached its limit of connections (maxclients): {said}"
        ));
    }
    StoreError::rejected(format!("{of}: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_arguments_are_not_shown() {
        let said = "ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' 's3cret' ";
        assert_eq!(without_arguments(said), "ERR unknown command 'HELLO'");
        assert_eq!(without_arguments("ERR other"), "ERR other");
    }

    #[test]
    fn codes_are_found_in_the_words_of_old_and_new_servers() {
        for said in [
            "READONLY You can't write against a read only replica. script: 1f, on @user_script:9.",
            "ERR Error running script (call to f_1f): @user_script:9: @user_script: 9: -READONLY You can't write",
            "LOADING Redis is loading the dataset in memory",
            "MOVED 1 127.0.0.1:7000",
        ] {
            assert!(is_elsewhere(said), "{said}");
        }
        for said in ["ERR the TASK is MASKED", "ERR unknown", "NOSCRIPT No matching script."] {
            assert!(!is_elsewhere(said), "{said}");
        }
        assert!(has_code("ERR Error running script (call to f_1): @user_script:1: WRONGTYPE Operation", "WRONGTYPE"));
    }
}
