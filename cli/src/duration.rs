//! Lengths of time, as people write and read them.

use std::time::Duration;

use nblock::options::LockOptions;

/// A length of time: a number of seconds, or a number with a unit (`ms`, `s`, `m`, `h`, `d`).
pub fn parse(text: &str) -> Result<Duration, String> {
    const RULE: &str = "must be seconds, such as 90 or 1.5, or a number with a unit: 250ms, 90s, 5m, 2h, 1d";
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_nanos: u128 = match unit {
        "ms" => 1_000_000,
        "" | "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        _ => return Err(RULE.to_string()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return Err(RULE.to_string());
    }
    if whole.len() > 12 || fraction.len() > 12 {
        return Err(format!("{RULE}; at most 12 digits before and after the point"));
    }
    // At most 12 digits each: nothing overflows 128 bits.
    let parts = |digits: &str| if digits.is_empty() { 0 } else { digits.parse::<u128>().unwrap_or(0) };
    let nanos = parts(whole) * unit_nanos + parts(fraction) * unit_nanos / 10u128.pow(fraction.len() as u32);
    Ok(Duration::new((nanos / 1_000_000_000) as u64, (nanos % 1_000_000_000) as u32))
}

/// The length of a lease: bounded (R21).
pub fn parse_expire(text: &str) -> Result<Duration, String> {
    let expire = parse(text)?;
    let options = LockOptions { expire: Some(expire), ..LockOptions::default() };
    options.check().map_err(|error| error.message().to_string())?;
    Ok(expire)
}

/// For people: two or three digits and a unit.
pub fn show(length: Duration) -> String {
    let seconds = length.as_secs_f64();
    match seconds {
        _ if seconds > 0.0 && seconds < 0.000_001 => "less than 1 µs".to_string(),
        _ if seconds < 0.000_999_5 => format!("{:.0} µs", seconds * 1e6),
        _ if seconds < 0.999_5 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 99.95 => format!("{seconds:.1} s"),
        _ if seconds < 99.5 * 60.0 => format!("{:.0} min", seconds / 60.0),
        _ if seconds < 99.95 * 3600.0 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} d", seconds / 86_400.0),
    }
}

/// A wall-clock moment, in milliseconds since 1970, as RFC 3339 has it, in UTC.
pub fn show_moment(millis: u64) -> String {
    let (days, of_day) = (millis / 86_400_000, millis % 86_400_000);
    // Days to a date, by eras of 400 years of 146097 days that begin on 1 March.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let months_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * months_from_march + 2) / 5 + 1;
    let month = if months_from_march < 10 { months_from_march + 3 } else { months_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (seconds, millis) = (of_day / 1000, of_day % 1000);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        for (text, nanos) in [
            ("0", 0),
            ("1.5", 1_500_000_000),
            (".25", 250_000_000),
            ("2.", 2_000_000_000),
            ("250ms", 250_000_000),
            ("0.5ms", 500_000),
            ("90s", 90_000_000_000),
            ("1.5m", 90_000_000_000),
            ("2h", 7_200_000_000_000),
            ("1d", 86_400_000_000_000),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for text in ["", ".", "-1", "+1", "1e3", "inf", "nan", "1 s", "1.2.3", "s", "5y", "1234567890123", "١"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse_expire("0").unwrap_err().contains("1 ms to 366 days"));
        assert!(parse_expire("367d").unwrap_err().contains("1 ms to 366 days"));
        assert_eq!(parse_expire("366d"), Ok(Duration::from_secs(366 * 86_400)));
    }

    #[test]
    fn shown() {
        for (nanos, text) in [
            (0, "0 µs"),
            (999, "less than 1 µs"),
            (12_345, "12 µs"),
            (12_345_678, "12 ms"),
            (999_400_000, "999 ms"),
            (999_900_000, "1.0 s"),
            (42_123_000_000, "42.1 s"),
            (180_000_000_000, "3 min"),
            (36_000_000_000_000, "10.0 h"),
            (864_000_000_000_000, "10.0 d"),
        ] {
            assert_eq!(show(Duration::from_nanos(nanos)), text);
        }
    }

    #[test]
    fn moments() {
        // date -u -d @N +%FT%T.000Z
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(show_moment(millis), text);
        }
    }
}
