//! The PostgreSQL store on real servers: what is no other store's matter.

use std::sync::{Arc, Mutex, Weak};

use crate::servers::Server;

/// A server that the tests of this program share, while one of them has it. Its data is not synced.
pub fn shared() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let server = Arc::new(Server::start("postgresql", &["fsync=off"]));
        *shared = Arc::downgrade(&server);
        server
    })
}
