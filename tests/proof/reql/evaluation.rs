//! What a ReQL query means: the terms that the store uses, over tables in memory.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// Rows by primary key, of tables by name. Every table is there.
pub type Tables = BTreeMap<String, BTreeMap<String, Value>>;

/// Why there is no value.
#[derive(Debug)]
pub enum Fault {
    /// Something is not there: what `default` is for.
    Missing(String),
    Wrong(String),
}

type Answer = Result<Value, Fault>;

/// A row that is not any more what it was.
pub struct Changed {
    pub table: String,
    pub key: String,
    pub row: Value,
}

/// One query, with the server's time when it arrived.
pub struct Evaluation<'a> {
    pub tables: &'a mut Tables,
    pub now: f64,
    pub changed: Vec<Changed>,
    variables: Vec<(Value, Value)>,
}

/// RethinkDB ql2.proto: Term.TermType.
mod kind {
    pub const MAKE_ARRAY: u64 = 2;
    pub const VAR: u64 = 10;
    pub const ERROR: u64 = 12;
    pub const TABLE: u64 = 15;
    pub const GET: u64 = 16;
    pub const EQ: u64 = 17;
    pub const LT: u64 = 19;
    pub const GT: u64 = 21;
    pub const ADD: u64 = 24;
    pub const MUL: u64 = 26;
    pub const HAS_FIELDS: u64 = 32;
    pub const WITHOUT: u64 = 34;
    pub const MERGE: u64 = 35;
    pub const MAP: u64 = 38;
    pub const FILTER: u64 = 39;
    pub const UNION: u64 = 44;
    pub const NTH: u64 = 45;
    pub const TYPE_OF: u64 = 52;
    pub const REPLACE: u64 = 55;
    pub const INSERT: u64 = 56;
    pub const FUNCALL: u64 = 64;
    pub const BRANCH: u64 = 65;
    pub const OR: u64 = 66;
    pub const AND: u64 = 67;
    pub const GET_ALL: u64 = 78;
    pub const DEFAULT: u64 = 92;
    pub const KEYS: u64 = 94;
    pub const JSON: u64 = 98;
    pub const TO_EPOCH_TIME: u64 = 102;
    pub const NOW: u64 = 103;
    pub const SPLIT: u64 = 149;
    pub const CHANGES: u64 = 152;
    pub const BRACKET: u64 = 170;
    pub const TO_JSON_STRING: u64 = 172;
    pub const CONFIG: u64 = 174;
    pub const ROUND: u64 = 185;
}

/// The row that a term asks for the changes of, where it does: its table and key.
pub fn feed_of(term: &Value) -> Option<(String, String)> {
    let row = &term[1][0];
    (term[0] == kind::CHANGES && row[0] == kind::GET).then(|| (table_name(&row[1][0]), key_text(&row[1][1])))
}

/// Whether its values come one by one.
pub fn is_stream(term: &Value) -> bool {
    term[0] == kind::UNION
}

fn table_name(term: &Value) -> String {
    assert_eq!(term[0], kind::TABLE, "{term}");
    term[1][1].as_str().expect("a table's name").to_string()
}

fn key_text(key: &Value) -> String {
    key.as_str().map_or_else(|| key.to_string(), str::to_string)
}

impl<'a> Evaluation<'a> {
    pub fn new(tables: &'a mut Tables, now: f64) -> Evaluation<'a> {
        Evaluation { tables, now, changed: Vec::new(), variables: Vec::new() }
    }

    pub fn value(&mut self, term: &Value) -> Answer {
        match term {
            Value::Array(parts) => {
                let kind = parts[0].as_u64().expect("a term's number");
                let arguments = parts.get(1).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                self.call(kind, arguments, parts.get(2).unwrap_or(&Value::Null))
            }
            Value::Object(fields) => {
                let fields = fields.iter().map(|(name, term)| Ok((name.clone(), self.value(term)?)));
                Ok(Value::Object(fields.collect::<Result<_, Fault>>()?))
            }
            plain => Ok(plain.clone()),
        }
    }

    fn call(&mut self, kind: u64, arguments: &[Value], options: &Value) -> Answer {
        // Those that do not look at all of their arguments, or not at their values.
        match kind {
            kind::VAR => {
                let bound = self.variables.iter().rev().find(|(name, _)| *name == arguments[0]);
                return Ok(bound.expect("a variable that is bound").1.clone());
            }
            kind::TABLE => {
                let rows = self.tables.get(arguments[1].as_str().expect("a table's name"));
                return Ok(rows.map_or(json!([]), |rows| rows.values().cloned().collect()));
            }
            kind::GET => return Ok(self.row(&table_name(&arguments[0]), &key_text(&arguments[1]))),
            kind::GET_ALL => {
                let (table, keys) = self.keys_of_all(arguments)?;
                return Ok(keys.iter().map(|key| self.row(&table, key)).filter(|row| !row.is_null()).collect());
            }
            kind::REPLACE => {
                let replaced = self.replace(&arguments[0], &arguments[1])?;
                return Ok(told(replaced, options));
            }
            kind::INSERT => {
                let inserted = self.insert(&table_name(&arguments[0]), &arguments[1], &options["conflict"])?;
                return Ok(told(inserted, options));
            }
            kind::CONFIG => return Ok(json!({ "write_acks": "majority" })),
            kind::BRANCH => {
                for pair in arguments.chunks(2) {
                    match pair {
                        [condition, value] if is_true(&self.value(condition)?) => return self.value(value),
                        [_, _] => {}
                        [otherwise] => return self.value(otherwise),
                        _ => break,
                    }
                }
                return Err(Fault::Wrong("a branch without an end".into()));
            }
            kind::AND | kind::OR => {
                let mut last = Value::Bool(kind == kind::AND);
                for argument in arguments {
                    last = self.value(argument)?;
                    if is_true(&last) == (kind == kind::OR) {
                        break;
                    }
                }
                return Ok(last);
            }
            kind::DEFAULT => {
                return match self.value(&arguments[0]) {
                    Ok(Value::Null) | Err(Fault::Missing(_)) => self.value(&arguments[1]),
                    other => other,
                };
            }
            kind::FUNCALL => {
                let argument = self.value(&arguments[1])?;
                return self.apply(&arguments[0], [argument]);
            }
            kind::MAP | kind::FILTER => return self.each(kind, &arguments[0], &arguments[1]),
            _ => {}
        }
        let values = arguments.iter().map(|argument| self.value(argument)).collect::<Result<Vec<_>, _>>()?;
        plain(kind, values, self.now)
    }

    fn row(&self, table: &str, key: &str) -> Value {
        self.tables.get(table).and_then(|rows| rows.get(key)).cloned().unwrap_or(Value::Null)
    }

    fn keys_of_all(&mut self, arguments: &[Value]) -> Result<(String, Vec<String>), Fault> {
        let keys = self.value(&arguments[1][1][0])?;
        Ok((table_name(&arguments[0]), keys.as_array().expect("keys").iter().map(key_text).collect()))
    }

    fn apply<const N: usize>(&mut self, function: &Value, arguments: [Value; N]) -> Answer {
        let (names, body) = (&function[1][0][1], &function[1][1]);
        let bound = self.variables.len();
        let named = arguments.into_iter().enumerate().map(|(index, argument)| (names[index].clone(), argument));
        self.variables.extend(named);
        let value = self.value(body);
        self.variables.truncate(bound);
        value
    }

    fn each(&mut self, kind: u64, sequence: &Value, function: &Value) -> Answer {
        let Value::Array(items) = self.value(sequence)? else { return Err(Fault::Wrong("no sequence".into())) };
        let mut out = Vec::new();
        for item in items {
            match (kind, self.apply(function, [item.clone()])) {
                (kind::MAP, value) => out.push(value?),
                (_, Ok(kept)) if is_true(&kept) => out.push(item),
                (_, Ok(_) | Err(Fault::Missing(_))) => {}
                (_, Err(fault)) => return Err(fault),
            }
        }
        Ok(Value::Array(out))
    }

    fn replace(&mut self, target: &Value, function: &Value) -> Answer {
        let arguments = target[1].as_array().expect("what is replaced");
        let (table, keys) = match target[0].as_u64() {
            Some(kind::GET) => (table_name(&arguments[0]), vec![key_text(&arguments[1])]),
            Some(kind::GET_ALL) => {
                let (table, keys) = self.keys_of_all(arguments)?;
                let there = keys.into_iter().filter(|key| !self.row(&table, key).is_null()).collect();
                (table, there)
            }
            _ => return Err(Fault::Wrong("no row to replace".into())),
        };
        let mut answer = nothing_written();
        for key in keys {
            let before = self.row(&table, &key);
            let after = self.apply(function, [before.clone()]);
            self.write(&table, key, before, after, &mut answer);
        }
        Ok(answer)
    }

    /// Creates a row, under the primary key that the table of locks has.
    fn insert(&mut self, table: &str, row: &Value, conflict: &Value) -> Answer {
        let row = self.value(row)?;
        let key = key_text(&row["key_hash"]);
        let before = self.row(table, &key);
        let after = match &before {
            Value::Null => Ok(row),
            there => self.apply(conflict, [json!(key), there.clone(), row]),
        };
        let mut answer = nothing_written();
        self.write(table, key, before, after, &mut answer);
        Ok(answer)
    }

    /// Writes one row, and counts it. A fault leaves the row as it was.
    fn write(&mut self, table: &str, key: String, before: Value, after: Answer, answer: &mut Value) {
        let (done, after) = match after {
            Ok(after) => match (&before, &after) {
                (Value::Null, Value::Null) => ("skipped", after),
                (Value::Null, _) => ("inserted", after),
                (_, Value::Null) => ("deleted", after),
                (before, _) if *before == after => ("unchanged", after),
                _ => ("replaced", after),
            },
            Err(Fault::Missing(why) | Fault::Wrong(why)) => {
                answer["first_error"] = json!(why);
                ("errors", before.clone())
            }
        };
        answer[done] = json!(answer[done].as_u64().unwrap_or(0) + 1);
        if before != after {
            let rows = self.tables.entry(table.to_string()).or_default();
            match after.is_null() {
                true => rows.remove(&key),
                false => rows.insert(key.clone(), after.clone()),
            };
            self.changed.push(Changed { table: table.to_string(), key, row: after.clone() });
        }
        answer["changes"].as_array_mut().expect("changes").push(json!({ "old_val": before, "new_val": after }));
    }
}

/// What a write of no row answers.
fn nothing_written() -> Value {
    json!({
        "deleted": 0, "errors": 0, "inserted": 0, "replaced": 0, "skipped": 0, "unchanged": 0, "changes": []
    })
}

/// The answer of a write, with the changes where they were asked for.
fn told(mut answer: Value, options: &Value) -> Value {
    if options["return_changes"] != "always" {
        answer.as_object_mut().expect("an object").remove("changes");
    }
    answer
}

/// Terms of which nothing is left but their arguments' values.
fn plain(kind: u64, mut values: Vec<Value>, now: f64) -> Answer {
    let wrong = |values: &[Value]| Err(Fault::Wrong(format!("term {kind} of {values:?}")));
    Ok(match (kind, values.as_mut_slice()) {
        (kind::MAKE_ARRAY, _) => Value::Array(values),
        (kind::NOW, _) => time(now),
        (kind::EQ, [one, other]) => Value::Bool(compare(one, other) == Ordering::Equal),
        (kind::LT, [one, other]) => Value::Bool(compare(one, other) == Ordering::Less),
        (kind::GT, [one, other]) => Value::Bool(compare(one, other) == Ordering::Greater),
        (kind::ERROR, [Value::String(text)]) => return Err(Fault::Wrong(std::mem::take(text))),
        (kind::TO_JSON_STRING, [value]) => json!(value.to_string()),
        (kind::ADD, [Value::String(one), Value::String(other)]) => json!(format!("{one}{other}")),
        (kind::ADD, [one, other]) => match (epoch(one), one.as_f64(), other.as_f64()) {
            (Some(epoch), _, Some(seconds)) => time(epoch + seconds),
            (None, Some(one), Some(other)) => json!(one + other),
            _ => return wrong(&values),
        },
        (kind::MUL, [one, other]) => match (one.as_f64(), other.as_f64()) {
            (Some(one), Some(other)) => json!(one * other),
            _ => return wrong(&values),
        },
        (kind::ROUND, [Value::Number(number)]) => json!(number.as_f64().unwrap_or(0.0).round()),
        (kind::MERGE, [Value::Object(one), Value::Object(other)]) => Value::Object(merged(one, other)),
        (kind::WITHOUT, [Value::Object(one), Value::Object(names)]) => Value::Object(without(one, names)),
        (kind::UNION, [Value::Array(one), Value::Array(other)]) => one.drain(..).chain(other.drain(..)).collect(),
        (kind::NTH | kind::BRACKET, [Value::Array(items), Value::Number(index)]) => {
            let index = index.as_f64().unwrap_or(0.0) as usize;
            items.get(index).cloned().ok_or_else(|| Fault::Missing(format!("Index out of bounds: {index}")))?
        }
        (kind::BRACKET, [Value::Object(fields), Value::String(name)]) => {
            fields.get(name).cloned().ok_or_else(|| Fault::Missing(format!("No attribute `{name}` in object")))?
        }
        (kind::HAS_FIELDS, [Value::Object(fields), Value::String(name)]) => {
            json!(fields.get(name).is_some_and(|value| !value.is_null()))
        }
        (kind::HAS_FIELDS, [Value::Null, _]) => return Err(Fault::Missing("of null".into())),
        (kind::BRACKET | kind::NTH, [Value::Null, _]) => return Err(Fault::Missing("of null".into())),
        (kind::TYPE_OF, [value]) => json!(type_name(value)),
        (kind::KEYS, [Value::Object(fields)]) => fields.keys().map(|name| json!(name)).collect(),
        (kind::JSON, [Value::String(text)]) => serde_json::from_str(text).expect("JSON"),
        (kind::TO_EPOCH_TIME, [value]) => match epoch(value) {
            Some(epoch) => json!(epoch),
            None => return wrong(&values),
        },
        (kind::SPLIT, [Value::String(text), Value::String(separator)]) => {
            text.split(separator.as_str()).map(|part| json!(part)).collect()
        }
        _ => return wrong(&values),
    })
}

fn is_true(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false))
}

/// Times have milliseconds.
fn time(epoch: f64) -> Value {
    json!({ "$reql_type$": "TIME", "epoch_time": (epoch * 1000.0).round() / 1000.0, "timezone": "+00:00" })
}

fn epoch(value: &Value) -> Option<f64> {
    value.get("$reql_type$")?;
    value["epoch_time"].as_f64()
}

/// Names of types, which is also their order.
fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "ARRAY",
        Value::Bool(_) => "BOOL",
        Value::Null => "NULL",
        Value::Number(_) => "NUMBER",
        Value::Object(_) if epoch(value).is_some() => "PTYPE<TIME>",
        Value::Object(_) => "OBJECT",
        Value::String(_) => "STRING",
    }
}

/// Across types too, by their names.
fn compare(one: &Value, other: &Value) -> Ordering {
    let number = |value: &Value| epoch(value).or(value.as_f64());
    type_name(one).cmp(type_name(other)).then_with(|| match (number(one), number(other), one, other) {
        (Some(one), Some(other), ..) => one.total_cmp(&other),
        (_, _, Value::String(one), Value::String(other)) => one.cmp(other),
        _ if one == other => Ordering::Equal,
        _ => one.to_string().cmp(&other.to_string()),
    })
}

/// Without the fields that are named with `true`, in objects within objects too.
fn without(one: &Map<String, Value>, names: &Map<String, Value>) -> Map<String, Value> {
    let mut kept = one.clone();
    for (name, named) in names {
        match (kept.get_mut(name), named) {
            (_, Value::Bool(true)) => drop(kept.remove(name)),
            (Some(Value::Object(inner)), Value::Object(names)) => *inner = without(inner, names),
            _ => {}
        }
    }
    kept
}

/// Objects within objects are merged too.
fn merged(one: &Map<String, Value>, other: &Map<String, Value>) -> Map<String, Value> {
    let mut all = one.clone();
    for (name, value) in other {
        let value = match (one.get(name), value) {
            (Some(Value::Object(one)), Value::Object(other)) if epoch(value).is_none() => {
                Value::Object(merged(one, other))
            }
            _ => value.clone(),
        };
        all.insert(name.clone(), value);
    }
    all
}
