//! ReQL terms: the few that the store needs, as the JSON that goes over the wire.

use std::ops;

use serde_json::Value;

/// One ReQL term, as text. Strings, numbers, booleans and null are terms as they stand.
#[derive(Clone, Debug, PartialEq)]
pub struct Term(String);

/// RethinkDB ql2.proto: Term.TermType, as text.
mod kind {
    pub const MAKE_ARRAY: &str = "2";
    pub const VAR: &str = "10";
    pub const ERROR: &str = "12";
    pub const DB: &str = "14";
    pub const TABLE: &str = "15";
    pub const GET: &str = "16";
    pub const EQ: &str = "17";
    pub const LT: &str = "19";
    pub const GT: &str = "21";
    pub const ADD: &str = "24";
    pub const MUL: &str = "26";
    pub const HAS_FIELDS: &str = "32";
    pub const WITHOUT: &str = "34";
    pub const MERGE: &str = "35";
    pub const MAP: &str = "38";
    pub const FILTER: &str = "39";
    pub const COUNT: &str = "43";
    pub const UNION: &str = "44";
    pub const NTH: &str = "45";
    pub const COERCE_TO: &str = "51";
    pub const TYPE_OF: &str = "52";
    pub const REPLACE: &str = "55";
    pub const DELETE: &str = "54";
    pub const INSERT: &str = "56";
    pub const DB_CREATE: &str = "57";
    pub const TABLE_CREATE: &str = "60";
    pub const FUNCALL: &str = "64";
    pub const BRANCH: &str = "65";
    pub const AND: &str = "67";
    pub const FUNC: &str = "69";
    pub const GET_ALL: &str = "78";
    pub const DEFAULT: &str = "92";
    pub const CONTAINS: &str = "93";
    pub const KEYS: &str = "94";
    pub const JSON: &str = "98";
    pub const TO_EPOCH_TIME: &str = "102";
    pub const NOW: &str = "103";
    pub const SPLIT: &str = "149";
    pub const CHANGES: &str = "152";
    pub const ARGS: &str = "154";
    pub const BRACKET: &str = "170";
    pub const TO_JSON_STRING: &str = "172";
    pub const CONFIG: &str = "174";
    pub const WAIT: &str = "177";
    pub const ROUND: &str = "185";
}

/// Variables of functions. Two that nest must differ.
pub mod var {
    pub const DOC: u32 = 1;
    pub const ENTRY: u32 = 2;
    pub const BATCH: u32 = 3;
    pub const CHANGE: u32 = 4;
    pub const KEY: u32 = 5;
}

fn call<const N: usize>(kind: &str, args: [Term; N]) -> Term {
    let mut text = opened(kind, &args);
    text.push_str("]]");
    Term(text)
}

fn call_with<const N: usize, const M: usize>(kind: &str, args: [Term; N], options: [(&str, Term); M]) -> Term {
    let mut text = opened(kind, &args);
    text.push_str("],");
    text.push_str(&object(options).0);
    text.push(']');
    Term(text)
}

/// A term up to its last argument.
fn opened(kind: &str, args: &[Term]) -> String {
    let mut text = String::with_capacity(args.iter().map(|arg| arg.0.len() + 1).sum::<usize>() + 16);
    text.push('[');
    text.push_str(kind);
    text.push_str(",[");
    push_all(&mut text, args.iter().map(|arg| arg.0.as_str()));
    text
}

/// The items, with commas between them.
fn push_all<'a>(text: &mut String, items: impl IntoIterator<Item = &'a str>) {
    for (index, item) in items.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(item);
    }
}

/// What `serde_json::to_string` made of a text or a number.
fn plain(written: serde_json::Result<String>) -> Term {
    Term(written.expect("texts and numbers can be written as JSON"))
}

impl From<&str> for Term {
    fn from(text: &str) -> Term {
        plain(serde_json::to_string(text))
    }
}

impl From<String> for Term {
    fn from(text: String) -> Term {
        plain(serde_json::to_string(&text))
    }
}

impl From<u64> for Term {
    fn from(number: u64) -> Term {
        plain(serde_json::to_string(&number))
    }
}

impl From<f64> for Term {
    fn from(number: f64) -> Term {
        plain(serde_json::to_string(&number))
    }
}

pub fn null() -> Term {
    Term("null".to_string())
}

fn yes() -> Term {
    Term("true".to_string())
}

pub fn no() -> Term {
    Term("false".to_string())
}

pub fn array<const N: usize>(items: [Term; N]) -> Term {
    call(kind::MAKE_ARRAY, items)
}

pub fn object<const N: usize>(fields: [(&str, Term); N]) -> Term {
    Term("{}".to_string()).with(fields)
}

/// A large value, which the server parses as data and not term by term.
pub fn data(value: &Value) -> Term {
    call(kind::JSON, [value.to_string().into()])
}

pub fn variable(number: u32) -> Term {
    call(kind::VAR, [u64::from(number).into()])
}

/// A function of one argument, which the body knows as `variable(number)`.
pub fn function(number: u32, body: Term) -> Term {
    function_of([number], body)
}

/// A function of several arguments.
pub fn function_of<const N: usize>(numbers: [u32; N], body: Term) -> Term {
    call(kind::FUNC, [array(numbers.map(|number| u64::from(number).into())), body])
}

/// The server's time: the moment at which this query arrived, the same throughout the query.
pub fn now() -> Term {
    call(kind::NOW, [])
}

/// Fails with this text: a row that was to be written stays, and the answer's `first_error` is the text.
pub fn error(text: Term) -> Term {
    call(kind::ERROR, [text])
}

/// Condition, consequence, condition, consequence, ..., otherwise.
pub fn branch<const N: usize>(args: [Term; N]) -> Term {
    const { assert!(N % 2 == 1 && N >= 3) };
    call(kind::BRANCH, args)
}

pub fn all<const N: usize>(conditions: [Term; N]) -> Term {
    call(kind::AND, conditions)
}

pub fn database(name: &str) -> Term {
    call(kind::DB, [name.into()])
}

pub fn create_database(name: &str) -> Term {
    call(kind::DB_CREATE, [name.into()])
}

pub fn union(first: Term, second: Term) -> Term {
    call(kind::UNION, [first, second])
}

impl Term {
    /// An object with more fields.
    pub fn with<const N: usize>(self, fields: [(&str, Term); N]) -> Term {
        let mut text = self.0;
        assert_eq!(text.pop(), Some('}'), "an object");
        for (name, value) in fields {
            if text.len() > 1 {
                text.push(',');
            }
            text.push_str(&Term::from(name).0);
            text.push(':');
            text.push_str(&value.0);
        }
        text.push('}');
        Term(text)
    }

    pub fn table(self, name: &str) -> Term {
        call(kind::TABLE, [self, name.into()])
    }

    /// A table that is read in this mode. Writes take none.
    pub fn table_read(self, name: &str, read_mode: &str) -> Term {
        call_with(kind::TABLE, [self, name.into()], [("read_mode", read_mode.into())])
    }

    pub fn create_table(self, name: &str, primary_key: &str, replicas: Option<u64>) -> Term {
        let (args, key) = ([self, name.into()], ("primary_key", primary_key.into()));
        match replicas {
            Some(replicas) => call_with(kind::TABLE_CREATE, args, [key, ("replicas", replicas.into())]),
            None => call_with(kind::TABLE_CREATE, args, [key]),
        }
    }

    pub fn get(self, primary_key: impl Into<Term>) -> Term {
        call(kind::GET, [self, primary_key.into()])
    }

    /// The rows with these primary keys; those that are not there are left out.
    pub fn get_all(self, primary_keys: Term) -> Term {
        call(kind::GET_ALL, [self, call(kind::ARGS, [primary_keys])])
    }

    /// Creates a row. Where there is one already, `conflict` decides about it: a function of the primary key, that
    /// row, and the new one.
    pub fn insert(self, row: Term, conflict: Term, durability: &str) -> Term {
        call_with(kind::INSERT, [self, row], [("durability", durability.into()), ("conflict", conflict)])
    }

    /// Replaces by `function`, and answers with the row before and after, changed or not.
    pub fn replace_telling(self, function: Term, durability: &str) -> Term {
        let options = [("durability", durability.into()), ("return_changes", "always".into())];
        call_with(kind::REPLACE, [self, function], options)
    }

    /// Replaces by `function`, and answers with counts only.
    pub fn replace(self, function: Term, durability: &str) -> Term {
        call_with(kind::REPLACE, [self, function], [("durability", durability.into())])
    }

    pub fn delete(self) -> Term {
        call(kind::DELETE, [self])
    }

    /// A feed of changes that begins with the present value.
    pub fn changes(self) -> Term {
        call_with(kind::CHANGES, [self], [("include_initial", yes()), ("squash", no())])
    }

    pub fn config(self) -> Term {
        call(kind::CONFIG, [self])
    }

    pub fn wait_for(self, timeout_s: f64) -> Term {
        call_with(kind::WAIT, [self], [("timeout", timeout_s.into())])
    }

    pub fn field(self, name: impl Into<Term>) -> Term {
        call(kind::BRACKET, [self, name.into()])
    }

    /// Whether it has a field of this name that is not null.
    pub fn has_field(self, name: &str) -> Term {
        call(kind::HAS_FIELDS, [self, name.into()])
    }

    pub fn nth(self, index: u64) -> Term {
        call(kind::NTH, [self, index.into()])
    }

    pub fn count(self) -> Term {
        call(kind::COUNT, [self])
    }

    pub fn contains(self, item: impl Into<Term>) -> Term {
        call(kind::CONTAINS, [self, item.into()])
    }

    pub fn keys(self) -> Term {
        call(kind::KEYS, [self])
    }

    /// This, or `other` where it, or what it is taken from, is missing or null.
    pub fn or_else(self, other: impl Into<Term>) -> Term {
        call(kind::DEFAULT, [self, other.into()])
    }

    pub fn equals(self, other: impl Into<Term>) -> Term {
        call(kind::EQ, [self, other.into()])
    }

    /// ReQL compares across types, by their names: check the type first.
    pub fn less_than(self, other: impl Into<Term>) -> Term {
        call(kind::LT, [self, other.into()])
    }

    pub fn greater_than(self, other: impl Into<Term>) -> Term {
        call(kind::GT, [self, other.into()])
    }

    pub fn rounded(self) -> Term {
        call(kind::ROUND, [self])
    }

    pub fn merge(self, fields: Term) -> Term {
        call(kind::MERGE, [self, fields])
    }

    /// Without the fields that `fields` names with `true`.
    pub fn without(self, fields: Value) -> Term {
        call(kind::WITHOUT, [self, Term(fields.to_string())])
    }

    pub fn map(self, function: Term) -> Term {
        call(kind::MAP, [self, function])
    }

    /// Rows for which `condition` fails are left out.
    pub fn filter(self, condition: Term) -> Term {
        call(kind::FILTER, [self, condition])
    }

    pub fn split(self, separator: &str) -> Term {
        call(kind::SPLIT, [self, separator.into()])
    }

    pub fn coerced_to_array(self) -> Term {
        call(kind::COERCE_TO, [self, "array".into()])
    }

    pub fn type_name(self) -> Term {
        call(kind::TYPE_OF, [self])
    }

    /// Seconds since 1970, with milliseconds.
    pub fn epoch_time(self) -> Term {
        call(kind::TO_EPOCH_TIME, [self])
    }

    /// Whole milliseconds since 1970.
    pub fn epoch_millis(self) -> Term {
        (self.epoch_time() * 1000u64.into()).rounded()
    }

    pub fn json_text(self) -> Term {
        call(kind::TO_JSON_STRING, [self])
    }

    /// Evaluates `body` with this as `variable(number)`, once.
    pub fn bind(self, number: u32, body: Term) -> Term {
        call(kind::FUNCALL, [function(number, body), self])
    }

    /// The body of a START query.
    ///
    /// RethinkDB ql2.proto: Query.QueryType.START.
    pub fn start(&self) -> Vec<u8> {
        format!("[1,{}]", self.0).into_bytes()
    }
}

impl ops::Add for Term {
    type Output = Term;

    fn add(self, other: Term) -> Term {
        call(kind::ADD, [self, other])
    }
}

impl ops::Mul for Term {
    type Output = Term;

    fn mul(self, other: Term) -> Term {
        call(kind::MUL, [self, other])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_on_the_wire() {
        let term = database("d").table("t").get("k").field("n").or_else(0u64).less_than(7u64);
        let text = String::from_utf8(term.start()).unwrap();
        assert_eq!(text, r#"[1,[19,[[92,[[170,[[16,[[15,[[14,["d"]],"t"]],"k"]],"n"]],0]],7]]]"#);
        let term = array([now(), object([("a", null())])]).bind(var::DOC, variable(var::DOC));
        let text = String::from_utf8(term.start()).unwrap();
        assert_eq!(text, r#"[1,[64,[[69,[[2,[1]],[10,[1]]]],[2,[[103,[]],{"a":null}]]]]]"#);
    }
}
