//! What every store does, rule by rule, asked of the trait itself. A store that is added to the macro at
//! the end has to pass every case: there is no other way to take part.

use std::sync::Arc;
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use nblock::clock::Boottime;
use nblock::key::Key;
use nblock::protocol::{
    Acquisition, Change, Holder, Judgement, Orphan, Proof, Release, Reply, Step, Verdict, step_out_of,
};
use nblock::record::{Lease, Record};
use nblock::store::{Filter, Store, StoreError, Watch};
use nblock::token::{HoldId, ObjectId, OwnerToken, Token};

use crate::asks::{Acquired, Asks, Broken, Claim, Released, Renewal, Renewed, Shown};
use crate::servers::Server;
use crate::support::{
    Directory, LONG, RETHINKDB, RawClient, answer, eventually, fresh_key, identity, key, open, skipped,
};

/// A store under test, opened twice.
pub struct Subject {
    pub store: Arc<dyn Store>,
    /// The same store, opened again.
    pub again: Arc<dyn Store>,
    /// Whether every grant brings its fence.
    fences: bool,
    /// Whether a record goes when its lease is over, so that nobody has it any more, its holder neither.
    pub forgets: bool,
    _server: Option<Arc<Server>>,
    _directory: Option<Directory>,
}

impl Subject {
    pub fn memory() -> Option<Subject> {
        let url = format!("memory:{}", HoldId::random());
        let open = || open(&url).expect("a memory store opens");
        Some(Subject { store: open(), again: open(), fences: true, forgets: false, _server: None, _directory: None })
    }

    pub fn embedded() -> Option<Subject> {
        let directory = Directory::new();
        let open = || directory.store().expect("an embedded store opens");
        Some(Subject {
            store: open(),
            again: open(),
            fences: true,
            forgets: false,
            _server: None,
            _directory: Some(directory),
        })
    }

    /// The store for RethinkDB, on a server in this program's memory.
    pub fn reql() -> Option<Subject> {
        let url = crate::reql::Server::start(1).url();
        let open = || open(&url).expect("a server in memory lets us in");
        Some(Subject { store: open(), again: open(), fences: false, forgets: false, _server: None, _directory: None })
    }

    pub fn rethinkdb() -> Option<Subject> {
        let Some(url) = std::env::var(RETHINKDB).ok().filter(|url| !url.is_empty()) else {
            skipped("conformance-rethinkdb", &format!("{RETHINKDB} is not set"));
            return None;
        };
        let open = || open(&url).unwrap_or_else(|error| panic!("{RETHINKDB} was set: {error}"));
        Some(Subject { store: open(), again: open(), fences: false, forgets: false, _server: None, _directory: None })
    }

    pub fn redis() -> Option<Subject> {
        Some(Subject { forgets: true, ..Subject::on_server("NBLOCK_TEST_REDIS_URL", crate::redis::server) })
    }

    pub fn postgres() -> Option<Subject> {
        Some(Subject::on_server("NBLOCK_TEST_POSTGRES_URL", crate::postgres::shared))
    }

    /// On the server that a variable names, or else on one of the tests' own.
    fn on_server(variable: &str, start: fn() -> Arc<Server>) -> Subject {
        let (url, server) = match std::env::var(variable).ok().filter(|url| !url.is_empty()) {
            Some(url) => (url, None),
            None => {
                let server = start();
                (server.url.clone(), Some(server))
            }
        };
        let open = || open(&url).unwrap_or_else(|error| panic!("{variable}: {error}"));
        Subject { store: open(), again: open(), fences: true, forgets: false, _server: server, _directory: None }
    }

    fn ask(&self, key: &Key, client: &mut RawClient, expire: Duration) -> Acquired {
        answer(self.store.acquire(key, client.attempt(expire))).expect("acquire is answered")
    }

    /// A grant, which must come.
    fn grant(&self, key: &Key, expire: Duration) -> RawClient {
        let mut client = RawClient::new();
        let acquired = self.ask(key, &mut client, expire);
        assert!(matches!(acquired, Acquired::Granted { applied: true, .. }), "{acquired:?}");
        client
    }

    fn find(&self, key: &Key) -> Option<Record> {
        answer(self.again.find(key)).expect("find is answered")
    }

    fn found(&self, key: &Key) -> Record {
        self.find(key).expect("the record is there")
    }

    fn renew(&self, key: &Key, token: Token, n: u64, expire: Duration) -> Renewed {
        let renewal = Renewal { key: key.clone(), proof: Proof::Token(token), n, expire };
        one(answer(self.store.refresh(vec![renewal])))
    }

    fn release(&self, key: &Key, token: Token) -> Released {
        answer(self.store.release(key, Claim::Token(token))).expect("release is answered")
    }

    fn change(&self, key: &Key, change: &Change) -> Reply {
        answer(self.store.change(key, change.clone())).expect("a change is answered")
    }

    /// Whether a change was applied.
    fn applies(&self, key: &Key, change: &Change) -> bool {
        matches!(self.change(key, change), Reply::Applied { .. })
    }

    /// How often a reentrant lock is locked.
    fn count(&self, key: &Key) -> Option<u32> {
        self.find(key).and_then(|record| record.lock_count())
    }

    /// One more step of an object, as the lock takes it.
    fn enter(&self, key: &Key, object: &mut Object, expire: Duration) -> Entered {
        let mut acquisition = object.acquisition(expire);
        self.finish_entering(key, object, &mut acquisition)
    }

    fn finish_entering(&self, key: &Key, object: &mut Object, acquisition: &mut Acquisition) -> Entered {
        loop {
            let (asked, change) = acquisition.ask();
            object.write_seq = acquisition.write_seq();
            let change = change.until(Boottime::now() + LONG);
            match acquisition.read(asked, self.change(key, &change)) {
                Verdict::Ask => {}
                Verdict::Granted(granted) => {
                    let depth = object.held.map_or(0, |(_, depth)| depth) + 1;
                    object.held = Some((granted.hold, depth));
                    return Entered::Granted { hold: granted.hold, fence: granted.fence, change: Box::new(change) };
                }
                Verdict::Held(_) => return Entered::Held,
                Verdict::Lost | Verdict::Gone => return Entered::Lost,
            }
        }
    }

    fn leave(&self, key: &Key, object: &mut Object) -> Judgement {
        let release = object.leave();
        let reply = self.change(key, &release.change());
        release.judge(&reply, || Boottime::ZERO, Boottime::ZERO, false, Boottime::now)
    }

    /// Waits until the store itself calls the lease over, or has forgotten the record, if that is what it does then: a
    /// millisecond later.
    fn wait_for_expiry(&self, key: &Key) {
        eventually("the lease runs out", || match self.find(key) {
            found if self.forgets => found.is_none(),
            found => found.is_some_and(|record| record.lease.expired()),
        });
    }
}

fn one(renewed: Result<Vec<Result<Renewed, StoreError>>, StoreError>) -> Renewed {
    let mut renewed = renewed.expect("refresh is answered");
    assert_eq!(renewed.len(), 1);
    renewed.remove(0).expect("the renewal is answered")
}

/// A store that counts milliseconds names one more of a lease, lest a waiter come too early.
const COUNTED: Duration = Duration::from_millis(1);

/// R1, R2: the first has it, the next learns for how long, and the record says who.
fn grants_what_is_free(subject: &Subject) {
    let key = fresh_key();
    assert!(subject.find(&key).is_none());
    let mut first = RawClient::new();
    let Acquired::Granted { token, applied, fence } = subject.ask(&key, &mut first, LONG) else {
        panic!("not granted")
    };
    assert_eq!((token, applied), (first.token(1), true));
    assert_eq!(fence.is_some(), subject.fences);
    match subject.ask(&key, &mut RawClient::new(), LONG) {
        Acquired::Held { expires_in } => {
            assert!(expires_in <= LONG + COUNTED && expires_in > LONG / 2, "{expires_in:?}");
        }
        other => panic!("{other:?}"),
    }
    let record = subject.found(&key);
    assert_eq!(record.key, key);
    assert!(matches!(record.lease, Lease::Runs(left) if left <= LONG && left > LONG / 2), "{:?}", record.lease);
    let owner = record.owner.clone().expect("our records say whose they are");
    let identity = identity();
    assert_eq!((&owner.host, owner.pid, &owner.boot_id), (&identity.host, identity.pid, &identity.boot_id));
    assert_eq!(owner.app, identity.app);
    assert!(record.lock_count().is_none());
    assert_eq!(record.seen().token, token.to_string());
}

/// R2: taken over when the lease has run out, and not before.
fn takes_over_what_ran_out_and_not_before(subject: &Subject) {
    const EXPIRE: Duration = Duration::from_millis(150);
    let key = fresh_key();
    let before = Boottime::now();
    let first = subject.grant(&key, EXPIRE);
    let mut second = RawClient::new();
    eventually("the lease runs out", || match subject.ask(&key, &mut second, LONG) {
        Acquired::Granted { applied, .. } => applied,
        Acquired::Held { expires_in } => {
            assert!(expires_in <= EXPIRE + COUNTED, "{expires_in:?}");
            false
        }
        Acquired::TooLate => panic!("nothing is too late"),
    });
    // The store may keep milliseconds only.
    assert!(Boottime::now().since(before) + Duration::from_millis(1) >= EXPIRE, "taken over before its end");
    assert_eq!(subject.release(&key, first.token(1)), Released::NotOurs);
    assert_eq!(subject.renew(&key, first.token(1), 99, LONG), Renewed::Lost);
    assert_eq!(subject.release(&key, second.token(second.attempts)), Released::Released);
}

/// R2's last arm: asking again, because an answer was lost, finds the hold and keeps its token.
fn a_repeated_attempt_is_the_same_hold(subject: &Subject) {
    let key = fresh_key();
    let mut client = subject.grant(&key, LONG);
    let end = subject.found(&key).seen().expires_at;
    match subject.ask(&key, &mut client, LONG * 2) {
        Acquired::Granted { token, applied, .. } => assert_eq!((token, applied), (client.token(1), true)),
        other => panic!("{other:?}"),
    }
    assert!(subject.found(&key).seen().expires_at > end, "applied: the lease is the new one");
    // The token that the reply names is the hold's, and no other.
    assert_eq!(subject.release(&key, client.token(2)), Released::NotOurs);
    assert_eq!(subject.renew(&key, client.token(2), 9, LONG), Renewed::Lost);
    assert_eq!(subject.release(&key, client.token(1)), Released::Released);
}

/// R3: a late request, sent before the last one that was applied, changes nothing.
fn a_late_attempt_moves_no_deadline(subject: &Subject) {
    let key = fresh_key();
    let mut client = RawClient::new();
    let late = client.attempt(Duration::from_millis(1));
    let granted = subject.ask(&key, &mut client, LONG);
    assert!(matches!(granted, Acquired::Granted { applied: true, .. }));
    let seen = subject.found(&key).seen();
    for attempt in [late.clone(), late] {
        match answer(subject.store.acquire(&key, attempt)).unwrap() {
            Acquired::Granted { token, applied, .. } => assert_eq!((token, applied), (client.token(2), false)),
            other => panic!("{other:?}"),
        }
    }
    assert!(subject.found(&key).seen() == seen, "nothing was written");
}

/// R3: an attempt says until when it may take anything, be the record absent, over, or somebody's.
fn an_attempt_takes_nothing_too_late(subject: &Subject) {
    let key = fresh_key();
    let late = || {
        let mut attempt = RawClient::new().attempt(LONG);
        attempt.not_after = Boottime::now() - Duration::from_secs(60);
        attempt
    };
    assert_eq!(answer(subject.store.acquire(&key, late())).unwrap(), Acquired::TooLate);
    assert!(subject.find(&key).is_none());
    subject.grant(&key, Duration::from_millis(1));
    subject.wait_for_expiry(&key);
    let seen = || subject.find(&key).map(|record| record.seen());
    let before = seen();
    assert_eq!(answer(subject.store.acquire(&key, late())).unwrap(), Acquired::TooLate);
    assert!(seen() == before);

    let reentrant = fresh_key();
    let (_, enter) = Object::new("o").acquisition(LONG).ask();
    let too_late = subject.change(&reentrant, &enter.until(Boottime::now() - Duration::from_secs(60)));
    assert!(matches!(too_late, Reply::TooLate), "{too_late:?}");
    assert!(subject.find(&reentrant).is_none());
}

/// R6: only the token releases, or the hold when it is cleaned up after.
fn releases_its_own_and_nothing_else(subject: &Subject) {
    let key = fresh_key();
    let (holder, stranger) = (subject.grant(&key, LONG), RawClient::new());
    assert_eq!(subject.release(&key, stranger.token(1)), Released::NotOurs);
    assert_eq!(subject.release(&key, holder.token(2)), Released::NotOurs);
    assert_eq!(answer(subject.store.release(&key, Claim::AnyOf(stranger.hold))).unwrap(), Released::NotOurs);
    assert!(subject.find(&key).is_some());
    assert_eq!(subject.release(&key, holder.token(1)), Released::Released);
    assert!(subject.find(&key).is_none());
    assert_eq!(subject.release(&key, holder.token(1)), Released::NotOurs);

    let holder = subject.grant(&key, LONG);
    assert_eq!(answer(subject.store.release(&key, Claim::AnyOf(holder.hold))).unwrap(), Released::Released);
    assert!(subject.find(&key).is_none());
    // Its own lease may be over: what nobody took over is still its own (R5), where it is still there.
    let holder = subject.grant(&key, Duration::from_millis(1));
    subject.wait_for_expiry(&key);
    let released = if subject.forgets { Released::NotOurs } else { Released::Released };
    assert_eq!(subject.release(&key, holder.token(1)), released);
}

/// R8: longer, shorter, and back from overdue; only over a lower number; never another's; never a new hold.
fn renews_its_own_and_nothing_else(subject: &Subject) {
    let key = fresh_key();
    let holder = subject.grant(&key, LONG);
    let end = |subject: &Subject| subject.found(&key).seen().expires_at;
    let first = end(subject);
    assert_eq!(subject.renew(&key, holder.token(1), 3, LONG * 2), Renewed::Renewed { applied: true });
    let longer = end(subject);
    assert!(longer > first);
    // Late ones, and the same one again: ours, not applied.
    for n in [2, 3, 1] {
        assert_eq!(subject.renew(&key, holder.token(1), n, LONG * 9), Renewed::Renewed { applied: false });
        assert_eq!(end(subject), longer);
    }
    assert_eq!(subject.renew(&key, RawClient::new().token(1), 9, LONG), Renewed::Lost);
    assert_eq!(end(subject), longer);
    assert_eq!(subject.renew(&key, holder.token(1), 4, Duration::from_millis(1)), Renewed::Renewed { applied: true });
    subject.wait_for_expiry(&key);
    if subject.forgets {
        assert_eq!(subject.renew(&key, holder.token(1), 5, LONG), Renewed::Lost);
        assert!(subject.find(&key).is_none(), "a refresh never acquires");
        return;
    }
    assert_eq!(subject.renew(&key, holder.token(1), 5, LONG), Renewed::Renewed { applied: true });
    assert!(matches!(subject.ask(&key, &mut RawClient::new(), LONG), Acquired::Held { .. }));
    // A late attempt of the same hold does not undo it.
    let mut late = RawClient { hold: holder.hold, attempts: 1, n: 1 };
    assert!(matches!(subject.ask(&key, &mut late, LONG), Acquired::Granted { applied: false, .. }));

    assert_eq!(subject.release(&key, holder.token(1)), Released::Released);
    assert_eq!(subject.renew(&key, holder.token(1), 9, LONG), Renewed::Lost);
    assert!(subject.find(&key).is_none(), "a refresh never acquires");
}

/// R8, R12: many in one request, answered in its order, each by itself.
fn renews_a_batch(subject: &Subject) {
    let keys: Vec<Key> = (0..600).map(|_| fresh_key()).collect();
    let holders: Vec<RawClient> = keys.iter().map(|key| subject.grant(key, LONG)).collect();
    for index in (0..keys.len()).step_by(3) {
        assert_eq!(subject.release(&keys[index], holders[index].token(1)), Released::Released);
    }
    let batch = keys.iter().zip(&holders).map(|(key, holder)| Renewal {
        key: key.clone(),
        proof: Proof::Token(holder.token(1)),
        n: 2,
        expire: LONG * 2,
    });
    let renewed = answer(subject.store.refresh(batch.collect())).unwrap();
    assert_eq!(renewed.len(), keys.len());
    for (index, renewed) in renewed.into_iter().enumerate() {
        let expected = if index % 3 == 0 { Renewed::Lost } else { Renewed::Renewed { applied: true } };
        assert_eq!(renewed.unwrap(), expected, "number {index}");
    }
    assert!(answer(subject.store.refresh(Vec::new())).unwrap().is_empty());
}

/// Nothing is there of what is renewed: each of them is lost, which is not an error.
fn a_batch_of_which_nothing_is_left(subject: &Subject) {
    let renewal = |key: Key| {
        let token = Token { hold: HoldId::random(), attempt: 1 };
        Renewal { key, proof: Proof::Token(token), n: 2, expire: LONG }
    };
    let batch = (0..3).map(|_| renewal(fresh_key())).collect();
    for renewed in answer(subject.store.refresh(batch)).unwrap() {
        assert_eq!(renewed.unwrap(), Renewed::Lost);
    }
}

#[derive(Default)]
struct Woken(std::sync::Mutex<bool>, std::sync::Condvar);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// Waits, asleep, until the watch says that there was a change.
fn told(watch: &mut dyn Watch) {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    while watch.poll_change(&mut Context::from_waker(&waker)).is_pending() {
        let guard = woken.0.lock().unwrap();
        let (mut guard, waited) = woken.1.wait_timeout_while(guard, crate::support::PATIENCE, |woken| !*woken).unwrap();
        assert!(!waited.timed_out(), "the watch was not notified");
        *guard = false;
    }
}

/// R10: every watch is notified of a release, a break and a shortened lease, also when they come before
/// the first poll.
fn tells_watches(subject: &Subject) {
    let key = fresh_key();
    let holder = subject.grant(&key, LONG);
    let (mut one, mut two) = (subject.store.watch(&key), subject.again.watch(&key));
    assert_eq!(subject.release(&key, holder.token(1)), Released::Released);
    told(&mut *one);
    told(&mut *two);

    let holder = subject.grant(&key, LONG);
    let mut watch = subject.again.watch(&key);
    assert_eq!(subject.renew(&key, holder.token(1), 2, Duration::from_millis(1)), Renewed::Renewed { applied: true });
    told(&mut *watch);

    if subject.forgets {
        subject.wait_for_expiry(&key);
        subject.grant(&key, LONG);
    }
    let record = subject.found(&key);
    let mut watch = subject.again.watch(&key);
    assert_eq!(answer(subject.store.break_seen(&record)).unwrap(), Broken::Broken);
    told(&mut *watch);

    let mut object = Object::new("o");
    subject.enter(&key, &mut object, LONG).granted();
    let mut watch = subject.again.watch(&key);
    assert_eq!(subject.leave(&key, &mut object), Judgement::Released);
    told(&mut *watch);
}

/// R10: a watcher that sleeps is woken by what happens after it fell asleep.
fn wakes_a_sleeping_watch(subject: &Subject) {
    let key = fresh_key();
    for _ in 0..20 {
        let holder = subject.grant(&key, LONG);
        let mut watch = subject.again.watch(&key);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        // What came before the watch (its own beginning, on a network) may be reported first.
        while watch.poll_change(&mut Context::from_waker(&waker)).is_ready() {}
        std::thread::scope(|scope| {
            scope.spawn(|| told(&mut *watch));
            assert_eq!(subject.release(&key, holder.token(1)), Released::Released);
        });
    }
}

/// Whether what wakes a waiter comes through whatever stands before the server, for two clients of it.
pub fn wakes_through(url: &str, other: &str) {
    let open = |url| open(url).expect("it lets us in");
    let (store, again) = (open(url), open(other));
    let subject = Subject { store, again, fences: true, forgets: false, _directory: None, _server: None };
    tells_watches(&subject);
    wakes_a_sleeping_watch(&subject);
}

/// One object of a reentrant lock.
struct Object {
    owner: OwnerToken,
    object: ObjectId,
    write_seq: u64,
    held: Option<(HoldId, u32)>,
}

#[derive(Debug)]
enum Entered {
    Granted { hold: HoldId, fence: Option<u64>, change: Box<Change> },
    Held,
    Lost,
}

impl Entered {
    /// The hold that was entered, and the change that entered it.
    fn granted(self) -> (HoldId, Change) {
        match self {
            Entered::Granted { hold, change, .. } => (hold, *change),
            other => panic!("not entered: {other:?}"),
        }
    }
}

impl Object {
    fn new(owner: &str) -> Object {
        Object { owner: OwnerToken(owner.into()), object: ObjectId::random(), write_seq: 0, held: None }
    }

    fn acquisition(&self, expire: Duration) -> Acquisition {
        let client = (self.owner.clone(), self.object);
        Acquisition::reentrant(client, self.held, HoldId::random(), self.write_seq, expire, identity())
    }

    /// The way out of the last step in.
    fn leave(&mut self) -> Release {
        self.write_seq += 1;
        let (hold, depth) = self.held.expect("it is in");
        self.held = Some((hold, depth - 1)).filter(|(_, depth)| *depth > 0);
        Release::Step(Step {
            owner: self.owner.clone(),
            object: self.object,
            hold,
            count: depth - 1,
            write_seq: self.write_seq,
        })
    }
}

/// R17: the record counts, each step once, and the last leaves nothing.
fn reentrant_steps_count_once(subject: &Subject) {
    let key = fresh_key();
    let (mut a, mut b) = (Object::new("o"), Object::new("o"));
    let (hold, first) = subject.enter(&key, &mut a, LONG).granted();
    assert_eq!(subject.count(&key), Some(1));
    assert!(!subject.applies(&key, &first), "sent again, counted once");
    assert_eq!(subject.count(&key), Some(1));
    let (joined, second) = subject.enter(&key, &mut b, LONG).granted();
    assert_eq!((joined, subject.count(&key)), (hold, Some(2)));
    assert_eq!(subject.enter(&key, &mut a, LONG).granted().0, hold);
    assert_eq!(subject.count(&key), Some(3));
    assert!(!subject.applies(&key, &second));
    assert_eq!(subject.count(&key), Some(3));
    assert_eq!(*subject.found(&key).seen().token, *"o");

    let leave = a.leave().change();
    assert!(subject.applies(&key, &leave));
    assert_eq!(subject.count(&key), Some(2));
    assert!(!subject.applies(&key, &leave), "sent again, counted once");
    assert_eq!(subject.count(&key), Some(2));
    assert_eq!(subject.leave(&key, &mut b), Judgement::Released);
    assert_eq!(subject.count(&key), Some(1));
    // An object that never entered may leave: it is the owner token that counts.
    let record = subject.found(&key);
    assert!(step_out_of(&record, &OwnerToken("p".into())).is_none());
    let theirs = step_out_of(&record, &OwnerToken("o".into())).expect("the owner token has it");
    assert!(subject.applies(&key, &theirs.change()));
    assert!(subject.find(&key).is_none());
    assert_eq!(subject.leave(&key, &mut a), Judgement::Lost);
}

/// R17: many objects come and go, and the record keeps nothing of those that are out.
fn a_reentrant_record_does_not_grow(subject: &Subject) {
    let key = fresh_key();
    let mut stays = Object::new("o");
    subject.enter(&key, &mut stays, LONG).granted();
    for _ in 0..100 {
        let mut object = Object::new("o");
        subject.enter(&key, &mut object, LONG).granted();
        assert_eq!(subject.leave(&key, &mut object), Judgement::Released);
    }
    let Holder::Reentrant { count, entries, .. } = subject.found(&key).state.holder else { panic!("reentrant") };
    assert_eq!((count, entries.len()), (1, 1));
    assert_eq!(subject.leave(&key, &mut stays), Judgement::Released);
}

/// R17: a late request can bring a hold back that has ended, by its name. Ways out of the steps that it had before
/// take nothing of it, however late they come.
fn ways_out_of_a_hold_that_came_back(subject: &Subject) {
    let key = fresh_key();
    let (mut a, mut b) = (Object::new("o"), Object::new("o"));
    let (hold, first) = subject.enter(&key, &mut a, LONG).granted();
    subject.enter(&key, &mut b, LONG).granted();
    let (b_left, a_left) = (b.leave().change(), a.leave().change());
    assert!(subject.applies(&key, &b_left) && subject.applies(&key, &a_left));
    assert!(subject.find(&key).is_none());

    assert!(subject.applies(&key, &first), "applied twice, it is a step in");
    let mut c = Object::new("o");
    assert_eq!(subject.enter(&key, &mut c, LONG).granted().0, hold);
    assert_eq!(subject.count(&key), Some(2));
    assert!(!subject.applies(&key, &b_left), "its step in is not in this record");
    assert!(subject.applies(&key, &a_left), "the way out of what came back");
    assert!(!subject.applies(&key, &a_left));
    assert_eq!(subject.count(&key), Some(1), "what c is in");
    assert_eq!(subject.leave(&key, &mut c), Judgement::Released);
    assert!(subject.find(&key).is_none());
}

/// R17: owner token and hold, both.
fn reentrant_steps_need_owner_and_hold(subject: &Subject) {
    let key = fresh_key();
    let mut a = Object::new("o");
    let (hold, _) = subject.enter(&key, &mut a, LONG).granted();
    let (mut stranger, mut stale) = (Object::new("p"), Object::new("o"));
    assert!(matches!(subject.enter(&key, &mut stranger, LONG), Entered::Held));
    stranger.held = Some((hold, 1));
    stale.held = Some((HoldId::random(), 1));
    assert!(matches!(subject.enter(&key, &mut stranger, LONG), Entered::Lost));
    assert_eq!(subject.leave(&key, &mut stranger), Judgement::Lost);
    assert_eq!(subject.leave(&key, &mut stale), Judgement::Lost);
    let renew = |owner: &str, hold: HoldId, expire| {
        let proof = Proof::Owner { owner: OwnerToken(owner.into()), hold: Some(hold) };
        one(answer(subject.store.refresh(vec![Renewal { key: key.clone(), proof, n: 1, expire }])))
    };
    assert_eq!(renew("p", hold, LONG), Renewed::Lost);
    assert_eq!(renew("o", HoldId::random(), LONG), Renewed::Lost);
    let end = subject.found(&key).seen().expires_at;
    assert_eq!(renew("o", hold, Duration::from_millis(1)), Renewed::Renewed { applied: true });
    assert_eq!(subject.found(&key).seen().expires_at, end, "a step or renewal never lowers the lease's end");
    assert_eq!(subject.enter(&key, &mut a, Duration::from_millis(1)).granted().0, hold);
    assert_eq!(subject.count(&key), Some(2));
    assert_eq!(subject.found(&key).seen().expires_at, end);
    assert_eq!(renew("o", hold, LONG * 2), Renewed::Renewed { applied: true });
    assert!(subject.found(&key).seen().expires_at > end);
}

/// R17: giving up sets the count that there was before the step, whatever became of the step.
fn a_step_is_taken_back(subject: &Subject) {
    let key = fresh_key();
    let remove = |orphan: &Orphan| orphan.removals().iter().for_each(|removal| drop(subject.change(&key, removal)));
    let (mut a, mut b) = (Object::new("o"), Object::new("o"));
    subject.enter(&key, &mut a, LONG).granted();
    let mut entering = b.acquisition(LONG);
    let (_, enter) = subject.finish_entering(&key, &mut b, &mut entering).granted();
    assert_eq!(subject.count(&key), Some(2));
    let orphan = entering.orphan();
    for _ in 0..2 {
        remove(&orphan);
        assert_eq!(subject.count(&key), Some(1), "taken back once");
    }
    assert!(subject.applies(&key, &enter), "a ghost of the step comes late, before it takes nothing");
    assert_eq!(subject.count(&key), Some(2), "too many, never too few");
    remove(&orphan);
    assert_eq!(subject.count(&key), Some(1), "the removal that comes after it");

    // Nested: the object's entry is there, and knows of the later number.
    let mut entering = a.acquisition(LONG);
    let (_, enter) = subject.finish_entering(&key, &mut a, &mut entering).granted();
    let orphan = entering.orphan();
    remove(&orphan);
    assert_eq!(subject.count(&key), Some(1));
    assert!(!subject.applies(&key, &enter), "a ghost changes nothing");
    a.write_seq = entering.write_seq();
    a.held = a.held.map(|(hold, _)| (hold, 1));
    let (_, _) = subject.enter(&key, &mut a, LONG).granted();
    remove(&orphan);
    assert_eq!(subject.count(&key), Some(2), "nor does the removal, after a later step");

    // A stranger's removal takes nothing, and taking the only steps back leaves nothing.
    let mut stranger = Object::new("p").acquisition(LONG);
    let _ = stranger.ask();
    remove(&stranger.orphan());
    assert_eq!(subject.count(&key), Some(2));
    assert_eq!(subject.leave(&key, &mut a), Judgement::Released);
    assert_eq!(subject.leave(&key, &mut a), Judgement::Released);
    assert!(subject.find(&key).is_none());
}

/// R17: an expired hold goes on for the object that is in it, and is another hold for everybody else.
fn an_expired_reentrant_hold(subject: &Subject) {
    const SHORT: Duration = Duration::from_millis(1);
    let key = fresh_key();
    let mut a = Object::new("o");
    let mut entering = a.acquisition(SHORT);
    let mut unanswered = entering.clone();
    let (hold, _) = subject.finish_entering(&key, &mut a, &mut entering).granted();
    subject.wait_for_expiry(&key);
    if subject.forgets {
        assert!(matches!(subject.enter(&key, &mut a, LONG), Entered::Lost));
        let mut b = Object::new("o");
        assert_ne!(subject.enter(&key, &mut b, LONG).granted().0, hold);
        assert_eq!(subject.leave(&key, &mut a), Judgement::Lost);
        assert_eq!(subject.count(&key), Some(1));
        return;
    }
    a.held = None;
    let _ = unanswered.ask();
    assert_eq!(subject.finish_entering(&key, &mut a, &mut unanswered).granted().0, hold, "the same step, asked again");
    assert_eq!(subject.count(&key), Some(1));
    subject.wait_for_expiry(&key);
    assert_eq!(subject.enter(&key, &mut a, SHORT).granted().0, hold);
    assert_eq!(subject.count(&key), Some(2));
    subject.wait_for_expiry(&key);

    // Same owner token, other object, which knows nothing of that hold.
    let mut b = Object::new("o");
    let (other, _) = subject.enter(&key, &mut b, LONG).granted();
    assert_eq!(subject.count(&key), Some(1));
    assert_ne!(other, hold);
    assert_eq!(subject.leave(&key, &mut a), Judgement::Lost);
    assert_eq!(subject.count(&key), Some(1));
    assert_eq!(subject.leave(&key, &mut b), Judgement::Released);
    assert!(subject.find(&key).is_none());

    let mut a = Object::new("o");
    subject.enter(&key, &mut a, SHORT).granted();
    subject.wait_for_expiry(&key);
    let mut p = Object::new("p");
    subject.enter(&key, &mut p, LONG).granted();
    assert_eq!(subject.count(&key), Some(1));
    assert_eq!(subject.leave(&key, &mut a), Judgement::Lost);
}

/// Plain and reentrant locks of one key exclude each other, and do not touch each other's records.
fn plain_and_reentrant_exclude_each_other(subject: &Subject) {
    let key = fresh_key();
    let holder = subject.grant(&key, LONG);
    // Not even by presenting the token as an owner token, which only the holder knows.
    let mut thief = Object::new(&holder.token(1).to_string());
    for object in [&mut Object::new("o"), &mut thief] {
        assert!(matches!(subject.enter(&key, object, LONG), Entered::Held));
    }
    assert_eq!(subject.release(&key, holder.token(1)), Released::Released);
    let (hold, _) = subject.enter(&key, &mut thief, LONG).granted();
    assert!(matches!(subject.ask(&key, &mut RawClient::new(), LONG), Acquired::Held { .. }));
    assert_eq!(answer(subject.store.release(&key, Claim::AnyOf(hold))).unwrap(), Released::NotOurs);
    assert_eq!(subject.release(&key, holder.token(1)), Released::NotOurs);
    assert!(subject.find(&key).is_some());
}

/// R18: grows with every grant, over release, expiry and kind; one per hold.
fn fences_grow(subject: &Subject) {
    let key = fresh_key();
    let mut last = answer(subject.store.fence(&key)).unwrap();
    let mut higher = |fence: u64, what: &str| {
        assert!(fence > last && fence < 1 << 53, "{what}: {fence} after {last}");
        last = fence;
    };
    for _ in 0..50 {
        higher(answer(subject.again.fence(&key)).unwrap(), "asked for");
    }
    if !subject.fences {
        return;
    }
    for round in 0..100 {
        let mut client = RawClient::new();
        let Acquired::Granted { fence: Some(fence), .. } = subject.ask(&key, &mut client, LONG) else { panic!() };
        higher(fence, "a grant");
        let again = subject.ask(&key, &mut client, LONG);
        assert!(matches!(again, Acquired::Granted { fence: Some(same), .. } if same == fence), "one per hold");
        assert_eq!(subject.found(&key).fence, Some(fence));
        match round % 3 {
            0 => assert_eq!(subject.release(&key, client.token(1)), Released::Released),
            1 => assert_eq!(answer(subject.store.break_seen(&subject.found(&key))).unwrap(), Broken::Broken),
            _ => {
                assert_eq!(
                    subject.renew(&key, client.token(1), 9, Duration::from_millis(1)),
                    Renewed::Renewed { applied: true }
                );
                subject.wait_for_expiry(&key);
            }
        }
    }
    eventually("the last lease runs out", || match subject.enter(&key, &mut Object::new("o"), LONG) {
        Entered::Granted { fence: Some(fence), .. } => {
            higher(fence, "a reentrant grant");
            true
        }
        Entered::Held => false,
        other => panic!("{other:?}"),
    });
    higher(answer(subject.store.fence(&key)).unwrap(), "asked for after grants");
}

/// R19: all, the expired, one; and no token in what is shown.
fn lists_and_finds(subject: &Subject) {
    let (running, over, reentrant) = (fresh_key(), fresh_key(), fresh_key());
    let holder = subject.grant(&running, LONG);
    subject.grant(&over, Duration::from_millis(1));
    subject.enter(&reentrant, &mut Object::new("secret"), LONG).granted();
    subject.wait_for_expiry(&over);
    let listed = |filter| {
        let records = answer(subject.again.list_all(filter)).unwrap();
        [&running, &over, &reentrant].map(|key| records.iter().filter(|record| record.key == *key).count())
    };
    let over = usize::from(!subject.forgets);
    assert_eq!(listed(Filter::All), [1, over, 1]);
    assert_eq!(listed(Filter::Expired), [0, over, 0]);
    for (key, token) in [(&running, holder.token(1).to_string()), (&reentrant, "secret".to_string())] {
        let shown = format!("{:?}", subject.found(key));
        assert!(!shown.contains(&token), "a token is shown: {shown}");
    }
}

/// R19: a list is whole however long it is.
fn lists_many(subject: &Subject) {
    let keys: Vec<Key> = (0..1200).map(|_| fresh_key()).collect();
    for key in &keys {
        subject.grant(key, LONG);
    }
    let listed: std::collections::HashSet<String> =
        answer(subject.again.list_all(Filter::All)).unwrap().iter().map(|record| record.key.as_str().into()).collect();
    assert!(keys.iter().all(|key| listed.contains(key.as_str())));
}

/// R20: broken only as it was read: token, expiry, count and `n`.
fn breaks_only_what_was_seen(subject: &Subject) {
    let key = fresh_key();
    let holder = subject.grant(&key, LONG);
    let breaking = |record: &Record| answer(subject.store.break_seen(record)).unwrap();
    let seen = subject.found(&key);
    let renewed = subject.renew(&key, holder.token(1), 2, LONG + Duration::from_secs(1));
    assert_eq!(renewed, Renewed::Renewed { applied: true });
    assert_eq!(breaking(&seen), Broken::Changed, "it was renewed since");
    let mut lower = subject.found(&key);
    let Holder::Plain { write_seq, .. } = &mut lower.state.holder else { panic!("a plain hold") };
    *write_seq -= 1;
    assert_eq!(breaking(&lower), Broken::Changed);
    assert_eq!(breaking(&subject.found(&key)), Broken::Broken);
    assert_eq!(breaking(&seen), Broken::Changed, "it is gone");
    assert_eq!(subject.renew(&key, holder.token(1), 3, LONG), Renewed::Lost);
    subject.grant(&key, LONG);
    assert_eq!(breaking(&seen), Broken::Changed, "it is another's");

    let key = fresh_key();
    let mut object = Object::new("o");
    let (hold, _) = subject.enter(&key, &mut object, LONG * 3).granted();
    let seen = subject.found(&key);
    assert_eq!(subject.enter(&key, &mut object, LONG).granted().0, hold);
    assert_eq!(breaking(&seen), Broken::Changed, "it was entered once more");
    assert_eq!(breaking(&subject.found(&key)), Broken::Broken);
}

/// R21: keys and leases at their bounds.
fn keys_and_leases_at_their_bounds(subject: &Subject) {
    let unique = HoldId::random().to_string();
    let texts = [
        format!("{unique}\0"),
        format!("{unique}\0\0"),
        format!("{unique}é"),
        format!("{unique}e\u{301}"),
        format!("{unique}{}", "k".repeat(Key::MAX_BYTES - unique.len())),
        format!("{unique}{}", "k".repeat(Key::MAX_BYTES - unique.len() - 1)),
    ];
    let keys = texts.map(|text| key(&text));
    for key in &keys {
        let expire = nblock::options::MAX_EXPIRE;
        subject.grant(key, expire);
        let record = subject.found(key);
        assert_eq!(record.key, *key);
        assert!(record.lease.remaining() > expire - Duration::from_secs(3600));
    }
    for key in &keys {
        let record = subject.found(key);
        assert_eq!(answer(subject.store.break_seen(&record)).unwrap(), Broken::Broken);
    }
    let one = fresh_key();
    subject.grant(&one, nblock::options::MIN_EXPIRE);
    subject.wait_for_expiry(&one);
}

/// R2: of many who ask at once, one is granted.
fn of_many_one_is_granted(subject: &Subject) {
    for _ in 0..20 {
        let key = fresh_key();
        let barrier = std::sync::Barrier::new(8);
        let granted: usize = std::thread::scope(|scope| {
            let clients: Vec<_> = (0..8)
                .map(|number| {
                    let (key, barrier) = (&key, &barrier);
                    let store = if number % 2 == 0 { &subject.store } else { &subject.again };
                    scope.spawn(move || {
                        let attempt = RawClient::new().attempt(LONG);
                        barrier.wait();
                        let acquired = answer(store.acquire(key, attempt)).unwrap();
                        usize::from(matches!(acquired, Acquired::Granted { .. }))
                    })
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).sum()
        });
        assert_eq!(granted, 1);
    }
}

/// An answer that nobody waits for does not recall its request; and what a store says of itself.
fn requests_are_not_recalled(subject: &Subject) {
    let key = fresh_key();
    drop(subject.store.acquire(&key, RawClient::new().attempt(LONG)));
    eventually("the request is applied", || subject.find(&key).is_some());
    assert!(!answer(subject.store.ping()).unwrap().server.is_empty());
    assert!(!subject.store.location().is_empty());
    for expire in [nblock::options::MIN_EXPIRE, Duration::from_secs(1), LONG, nblock::options::MAX_EXPIRE] {
        let margin = subject.store.margin(expire);
        assert!(!margin.is_zero() && margin <= expire / 2, "{margin:?} of {expire:?}");
    }
}

macro_rules! conformance {
    ($($case:ident),* $(,)?) => {
        conformance!(store memory: $($case),*);
        conformance!(store embedded: $($case),*);
        conformance!(store reql: $($case),*);
        conformance!(store rethinkdb: $($case),*);
        conformance!(store redis: $($case),*);
        conformance!(store postgres: $($case),*);
    };
    (store $store:ident: $($case:ident),*) => {
        mod $store {
            $(
                #[test]
                fn $case() {
                    if let Some(subject) = super::Subject::$store() {
                        super::$case(&subject);
                    }
                }
            )*
        }
    };
}

conformance! {
    grants_what_is_free,
    takes_over_what_ran_out_and_not_before,
    a_repeated_attempt_is_the_same_hold,
    a_late_attempt_moves_no_deadline,
    an_attempt_takes_nothing_too_late,
    releases_its_own_and_nothing_else,
    renews_its_own_and_nothing_else,
    renews_a_batch,
    a_batch_of_which_nothing_is_left,
    tells_watches,
    wakes_a_sleeping_watch,
    reentrant_steps_count_once,
    ways_out_of_a_hold_that_came_back,
    reentrant_steps_need_owner_and_hold,
    a_reentrant_record_does_not_grow,
    a_step_is_taken_back,
    an_expired_reentrant_hold,
    plain_and_reentrant_exclude_each_other,
    fences_grow,
    lists_and_finds,
    lists_many,
    breaks_only_what_was_seen,
    keys_and_leases_at_their_bounds,
    of_many_one_is_granted,
    requests_are_not_recalled,
}
