//! A list of records.

use std::ffi::CString;

use super::error::Failure;
use super::text;
use crate::client::{Broken, Client};
use crate::error::Error;
use crate::record::Record;
use crate::store::Answer;

/// Records, their texts, and the client that read them.
#[derive(Default)]
pub(crate) struct List {
    pub records: Vec<Record>,
    /// In the order of the records. C has pointers to them, so they must not change until the list is freed.
    texts: Vec<Texts>,
    client: Option<Client>,
}

/// The texts of a record, for C.
pub(crate) struct Texts {
    /// Ends with a NUL, and may contain others.
    pub key: Box<[u8]>,
    pub key_hash: CString,
    pub host: CString,
    pub boot_id: CString,
    pub app: CString,
    pub damaged: CString,
    pub version: CString,
}

impl Texts {
    fn of(record: &Record) -> Texts {
        let (host, boot_id, app) = match &record.owner {
            Some(owner) => (owner.host.as_str(), owner.boot_id.as_str(), owner.app.as_str()),
            None => ("", "", ""),
        };
        Texts {
            key: [record.key.as_str().as_bytes(), b"\0"].concat().into(),
            key_hash: text::terminated(&record.key.hash().base64()),
            host: text::terminated(host),
            boot_id: text::terminated(boot_id),
            app: text::terminated(app),
            damaged: text::terminated(record.damaged.as_deref().unwrap_or("")),
            version: text::terminated(&record.version()),
        }
    }
}

impl List {
    pub fn new(records: Vec<Record>, client: &Client) -> List {
        let texts = records.iter().map(Texts::of).collect();
        List { records, texts, client: Some(client.clone()) }
    }

    /// The texts of the record at `index`, which must exist (see `get`).
    pub fn texts(&self, index: usize) -> &Texts {
        &self.texts[index]
    }

    pub fn get(&self, index: usize) -> Result<&Record, Failure> {
        self.records.get(index).ok_or_else(|| {
            Failure::invalid_argument(format!(
                "index must be below the number of records, {} (got {index})",
                self.records.len()
            ))
        })
    }

    /// Breaks the record at `index` if it has not changed since it was read. If it was not broken, returns why.
    pub fn break_seen(&self, index: usize) -> Result<Answer<Option<String>, Error>, Failure> {
        let record = self.get(index)?;
        let client = self.client.as_ref().ok_or_else(|| Failure::invalid_argument("the list has no client"))?;
        let key = record.key.quoted().to_string();
        Ok(client.break_seen(record).map(move |broken| match broken {
            Broken::Broken => None,
            Broken::Changed => Some(format!("the record of {key} has changed since it was read")),
            Broken::Foreign => Some(format!(
                "{key} was not written by nblock: it may be another program's data. If it is a lock, the command \
                 nblock break --foreign breaks it"
            )),
        }))
    }
}
