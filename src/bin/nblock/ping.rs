//! `nblock ping`.

use std::time::Duration;

use nblock::clock::Boottime;
use nblock::store::Pong;
use nblock::stores;
use nblock::sys::runtime;
use serde_json::json;

use crate::arguments::Ping;
use crate::failure::{Failure, status, write_out};
use crate::{duration, open};

/// How often it is asked: the quickest answer is the round trip.
const TRIPS: u32 = 5;

/// What an answering store said.
struct Answered {
    location: String,
    pong: Pong,
    round_trip: Duration,
}

pub fn ping(given: Option<&str>, ping: &Ping) -> Result<u8, Failure> {
    let (url, why) = stores::url_to_use(given)?;
    let url = format!("{url:?}");
    let answered = ask(given);
    if ping.json {
        let report = match &answered {
            Ok(Answered { location, pong, round_trip }) => json!({
                "nblock": env!("CARGO_PKG_VERSION"), "url": url, "why": why, "location": location, "reachable": true,
                "server": pong.server, "round_trip_ms": round_trip.as_secs_f64() * 1e3, "skew_ms": pong.skew_ms,
                "caveats": pong.caveats,
            }),
            Err(failure) => json!({
                "nblock": env!("CARGO_PKG_VERSION"), "url": url, "why": why, "reachable": false,
                "error": failure.to_string(),
            }),
        };
        write_out(&format!("{report:#}\n"))?;
        return Ok(answered.map_or_else(|failure| failure.status(), |_| 0));
    }
    write_out(&format!("store        {url} ({why})\n"))?;
    let Answered { location, pong, round_trip } = answered?;
    let skew = match pong.skew_ms {
        Some(skew) => format!("{skew} ms"),
        None => "not measured: one clock, or no answer that tells".to_string(),
    };
    write_out(&format!(
        "location     {location}\nserver       {}\nround trip   {}\nclock skew   {skew}\nnblock       {}\n",
        pong.server,
        duration::show(round_trip),
        env!("CARGO_PKG_VERSION"),
    ))?;
    for caveat in &pong.caveats {
        write_out(&format!("warning      {caveat}\n"))?;
    }
    Ok(0)
}

fn ask(given: Option<&str>) -> Result<Answered, Failure> {
    let client = open(given)?;
    let mut best: Option<(Duration, Pong)> = None;
    for _ in 0..TRIPS {
        let sent = Boottime::now();
        let pong = runtime::wait(client.ping())?;
        let trip = Boottime::now().since(sent);
        if best.as_ref().is_none_or(|(quickest, _)| trip < *quickest) {
            best = Some((trip, pong));
        }
    }
    let (round_trip, pong) = best.ok_or_else(|| Failure::new(status::INTERNAL, "the store was never asked"))?;
    Ok(Answered { location: client.location()?, pong, round_trip })
}
