//! Within a process, one store and one connection for each configuration (R25).

use std::sync::{Arc, Weak};

use crate::sys::mutex::Mutex;
use crate::sys::process::PerProcess;

/// The stores of one engine that this process has open, by all that their URLs and options say.
pub struct OpenStores<Config, Store>(PerProcess<Mutex<Vec<Known<Config, Store>>>>);

type Known<Config, Store> = (Config, Weak<Store>);

impl<Config: Clone + PartialEq, Store> OpenStores<Config, Store> {
    #[allow(clippy::new_without_default, reason = "it is for statics, which need a const function")]
    pub const fn new() -> OpenStores<Config, Store> {
        OpenStores(PerProcess::new())
    }

    /// The open store with this configuration, or the one that `open` makes. Does not wait.
    pub fn get_or_open(&self, config: Config, open: impl FnOnce(Config) -> Store) -> Arc<Store> {
        let mut stores = self.0.get_or_init(|_| Mutex::default()).lock();
        stores.retain(|(_, store)| store.strong_count() > 0);
        let known = stores.iter().find(|(known, _)| *known == config).and_then(|(_, store)| store.upgrade());
        known.unwrap_or_else(|| {
            let store = Arc::new(open(config.clone()));
            stores.push((config, Arc::downgrade(&store)));
            store
        })
    }
}
