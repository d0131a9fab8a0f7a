//! `nblock schema`.

use crate::arguments::{Engine, Schema};
use crate::failure::{Failure, write_out};

pub fn schema(schema: &Schema) -> Result<u8, Failure> {
    let Schema { engine: Engine::Postgres, table, user } = schema;
    write_out(&nblock::stores::postgres::schema(table.as_deref(), user)?)?;
    Ok(0)
}
