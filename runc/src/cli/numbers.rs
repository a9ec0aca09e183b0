//! Numbers as Go's library reads them, with its words for what is none: runc hands values of flags to it, and scripts see
//! what it says.

use std::time::Duration;

/// Why a text is no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Syntax,
    Range,
}

impl Fault {
    /// As the flag parser says it.
    pub fn of_flag(self) -> &'static str {
        match self {
            Fault::Syntax => "parse error",
            Fault::Range => "value out of range",
        }
    }

    /// As a conversion says it.
    pub fn of_conversion(self, function: &str, text: &str) -> String {
        let why = match self {
            Fault::Syntax => "invalid syntax",
            Fault::Range => "value out of range",
        };
        format!("strconv.{function}: parsing {}: {why}", quoted(text))
    }
}

/// `strconv.ParseInt(text, 10, 64)`.
///
/// # Errors
/// Text that is no number, or too big a one.
pub fn int(text: &str) -> Result<i64, Fault> {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Syntax);
    }
    text.parse().map_err(|_| Fault::Range)
}

/// `strconv.ParseUint(text, 10, 64)`.
///
/// # Errors
/// As [`int`]; a sign is no digit.
pub fn uint(text: &str) -> Result<u64, Fault> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Syntax);
    }
    text.parse().map_err(|_| Fault::Range)
}

/// `strconv.ParseInt(text, 0, 64)`: of any base that a prefix names.
///
/// # Errors
/// As [`int`].
pub fn int_of_any_base(text: &str) -> Result<i64, Fault> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.get(..2) {
        Some("0x") => (16, &lower[2..]),
        Some("0b") => (2, &lower[2..]),
        Some("0o") => (8, &lower[2..]),
        Some(two) if two.starts_with('0') => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(Fault::Syntax);
    }
    let sign = if negative { "-" } else { "" };
    i64::from_str_radix(&format!("{sign}{digits}"), radix).map_err(|_| Fault::Range)
}

/// `strconv.ParseBool`.
pub fn boolean(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

/// `time.ParseDuration`, of which nobody here wants a negative one: that is zero.
pub fn duration(text: &str) -> Option<Duration> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut seconds = 0.0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..end] {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[end..];
    }
    let found = Duration::try_from_secs_f64(seconds).ok()?;
    Some(if negative { Duration::ZERO } else { found })
}

/// An amount of memory: a number, fractions too, and a suffix (`b`, `k`, `kb`, `KiB` … `p`), powers of 1024.
///
/// # Errors
/// What is none, in the words of the library that engines and runc use.
pub fn bytes(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid size: '{text}'");
    let end = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ').ok_or_else(invalid)?;
    let (number, suffix) = text.split_at(end + 1);
    let number = number.strip_suffix(' ').unwrap_or(number);
    let amount: f64 = number.parse().map_err(|_| Fault::Syntax.of_conversion("ParseFloat", number))?;
    if amount < 0.0 {
        return Err(invalid());
    }
    let suffix = suffix.to_lowercase();
    let power = match suffix.as_str() {
        "" | "b" => Some(0),
        "k" | "kb" | "kib" => Some(1),
        "m" | "mb" | "mib" => Some(2),
        "g" | "gb" | "gib" => Some(3),
        "t" | "tb" | "tib" => Some(4),
        "p" | "pb" | "pib" => Some(5),
        _ => None,
    };
    let power = power.ok_or_else(|| format!("invalid suffix: '{suffix}'"))?;
    let amount = amount * 1024f64.powi(power);
    // A number of bytes that no kernel has would turn negative there.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)] // checked; Go truncates as well
    if amount < i64::MAX as f64 { Ok(amount as i64) } else { Err(invalid()) }
}

/// `%q`: in double quotes, what cannot be shown escaped.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\x07' => out.push_str("\\a"),
            '\x08' => out.push_str("\\b"),
            '\x0b' => out.push_str("\\v"),
            '\x0c' => out.push_str("\\f"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_the_suffixes_of_runc() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("64m", 64 << 20),
            ("64MiB", 64 << 20),
            ("1.5g", 3 << 29),
            ("1G", 1 << 30),
            ("2kb", 2048),
            ("2 kb", 2048),
            ("9b", 9),
            ("1p", 1 << 50),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for (text, said) in [
            ("", "invalid size: ''"),
            ("m", "invalid size: 'm'"),
            ("-2", "invalid size: '-2'"),
            ("1x", "invalid suffix: 'x'"),
            ("1KIBI", "invalid suffix: 'kibi'"),
            ("9223372036854775807k", "invalid size: '9223372036854775807k'"),
            ("1..5", "strconv.ParseFloat: parsing \"1..5\": invalid syntax"),
        ] {
            assert_eq!(bytes(text), Err(said.to_owned()), "{text}");
        }
    }

    #[test]
    fn integers_are_read_in_the_bases_that_go_knows() {
        for (text, expected) in [
            ("7", Ok(7)),
            ("-7", Ok(-7)),
            ("0x1F", Ok(31)),
            ("010", Ok(8)),
            ("0", Ok(0)),
            ("", Err(Fault::Syntax)),
            ("7k", Err(Fault::Syntax)),
            ("09", Err(Fault::Syntax)),
            ("99999999999999999999", Err(Fault::Range)),
        ] {
            assert_eq!(int_of_any_base(text), expected, "{text}");
        }
        assert_eq!(int("0x1"), Err(Fault::Syntax));
        assert_eq!(uint("-1"), Err(Fault::Syntax));
    }

    #[test]
    fn durations_have_units() {
        for (text, expected) in
            [("5s", Some(5000)), ("1m1.5s", Some(61500)), ("100ms", Some(100)), ("0", Some(0))]
        {
            assert_eq!(duration(text), expected.map(Duration::from_millis), "{text}");
        }
        for text in ["", "5", "s", "5 s", "1x"] {
            assert_eq!(duration(text), None, "{text}");
        }
        assert_eq!(duration("-5s"), Some(Duration::ZERO));
    }
}
