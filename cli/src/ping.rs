//! `nblock ping`.

use nblock::sys::runtime;
use nblock::{Ping, stores};
use serde_json::json;

use crate::arguments;
use crate::failure::{Failure, write_out};
use crate::{duration, open};

/// How often it is asked: the quickest answer is the round trip.
const TRIPS: u32 = 5;

pub fn ping(given: Option<&str>, arguments: &arguments::Ping) -> Result<u8, Failure> {
    let (url, why) = stores::url_to_use(given)?;
    let url = format!("{url:?}");
    let mut answered = ask(given);
    let memory = url.starts_with("memory:");
    if let Ok(ping) = &mut answered
        && memory
    {
        let caveat =
            "this store is inside one process: nblock run excludes nothing with it. Use it in tests of programs";
        ping.caveats.push(caveat.to_string());
    }
    if arguments.json {
        let report = match &answered {
            Ok(ping) => json!({
                "nblock": env!("CARGO_PKG_VERSION"), "url": url, "why": why, "location": ping.location,
                "reachable": true, "server": ping.server, "round_trip_ms": ping.round_trip.as_secs_f64() * 1e3,
                "skew_ms": ping.skew_ms, "caveats": ping.caveats,
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
    let ping = answered?;
    let skew = match ping.skew_ms {
        Some(skew) => format!("{skew} ms"),
        None if memory || url.starts_with("embedded:") => "none: the store uses this machine's clock".to_string(),
        None => "not measured".to_string(),
    };
    write_out(&format!(
        "location     {}\nserver       {}\nround trip   {}\nclock skew   {skew}\nnblock       {}\n",
        ping.location,
        ping.server,
        duration::show(ping.round_trip),
        env!("CARGO_PKG_VERSION"),
    ))?;
    for caveat in &ping.caveats {
        write_out(&format!("warning      {caveat}\n"))?;
    }
    Ok(0)
}

fn ask(given: Option<&str>) -> Result<Ping, Failure> {
    let client = open(given)?;
    let mut quickest = runtime::wait(client.ping())?;
    for _ in 1..TRIPS {
        let ping = runtime::wait(client.ping())?;
        if ping.round_trip < quickest.round_trip {
            quickest = ping;
        }
    }
    Ok(quickest)
}
