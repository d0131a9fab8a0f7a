//! What in a server's set-up endangers locks.

use super::resp::Value;

/// What INFO says, and `CONFIG GET save` where the account may ask for it.
pub fn found(info: &str, save: Option<&Value>) -> Vec<String> {
    let field = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
    };
    let mut caveats = Vec::new();
    let policy = field("maxmemory_policy");
    if !matches!(policy, "" | "noeviction") && !matches!(field("maxmemory"), "" | "0") {
        caveats.push(format!(
            "the server's maxmemory-policy is {policy}: when its memory is full it evicts locks that are held. Set it \
             with CONFIG SET maxmemory-policy noeviction, or keep locks on a server of their own"
        ));
    }
    let no_snapshots = save.and_then(|save| save.field("save")).and_then(Value::as_text) == Some("");
    if field("aof_enabled") == "0" && no_snapshots {
        caveats.push(
            "the server saves nothing to disk: when it restarts, locks that are held are free. Set appendonly yes and \
             appendfsync always"
                .to_string(),
        );
    }
    caveats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_warned_of() {
        let save = |value: &str| Value::Array(vec![Value::Text(b"save".to_vec()), Value::Text(value.into())]);
        let info = |maxmemory: &str, policy: &str, aof: &str| {
            format!("# Memory\r\nmaxmemory:{maxmemory}\r\nmaxmemory_policy:{policy}\r\naof_enabled:{aof}\r\n")
        };
        assert!(found(&info("100", "noeviction", "1"), Some(&save(""))).is_empty());
        assert!(found(&info("0", "allkeys-lru", "0"), Some(&save("3600 1"))).is_empty());
        assert!(found(&info("0", "noeviction", "0"), None).is_empty(), "not known");
        let evicts = found(&info("100", "volatile-lru", "1"), None);
        assert!(evicts.len() == 1 && evicts[0].contains("volatile-lru"), "{evicts:?}");
        let forgets = found(&info("0", "noeviction", "0"), Some(&save("")));
        assert!(forgets.len() == 1 && forgets[0].contains("appendonly"), "{forgets:?}");
        assert!(found("", None).is_empty());
    }
}
