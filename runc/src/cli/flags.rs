//! The grammar of runc's flags, which is that of Go's flag package with urfave/cli around it: one dash or two before any
//! name, `-flag=value` or `-flag value`, `--all=false`, flags between the arguments of most commands. Pure: arguments in,
//! values or the words of a usage error out.

use super::numbers::{self, quoted};

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Text,
    /// A text that may be given more than once.
    Texts,
    /// An integer in any base that a prefix names.
    Int,
    /// Integers, decimal, one each time.
    Ints,
    Duration,
}

#[derive(Debug, Clone, Copy)]
pub struct Flag {
    /// The first is the long one, by which its value is asked for.
    pub names: &'static [&'static str],
    pub kind: Kind,
    pub usage: &'static str,
    pub hidden: bool,
}

pub const fn flag(names: &'static [&'static str], kind: Kind, usage: &'static str) -> Flag {
    Flag { names, kind, usage, hidden: false }
}

/// Accepted, and in no help.
pub const fn hidden(names: &'static [&'static str], kind: Kind) -> Flag {
    Flag { names, kind, usage: "", hidden: true }
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    values: Vec<(&'static str, String)>,
    pub args: Vec<String>,
}

impl Parsed {
    /// The value that counts: the last one given.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.iter().rev().find(|(of, _)| *of == name).map(|(_, value)| value.as_str())
    }

    /// As [`Parsed::text`]; an empty one is none.
    pub fn filled(&self, name: &str) -> Option<&str> {
        self.text(name).filter(|text| !text.is_empty())
    }

    pub fn texts(&self, name: &str) -> Vec<String> {
        self.values.iter().filter(|(of, _)| *of == name).map(|(_, value)| value.clone()).collect()
    }

    pub fn is(&self, name: &str) -> bool {
        self.text(name).and_then(numbers::boolean).unwrap_or(false)
    }

    pub fn int(&self, name: &str) -> Option<i64> {
        self.text(name).and_then(|text| numbers::int_of_any_base(text).ok())
    }
}

/// Reads flags up to the first argument that is none, or `--`.
///
/// # Errors
/// The words of a usage error.
pub fn parse(flags: &[Flag], args: &[String]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut used: Vec<&str> = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.as_slice().first() {
        let Some(name) = arg.strip_prefix('-').filter(|name| !name.is_empty()) else { break };
        rest.next();
        if arg == "--" {
            break;
        }
        let name = name.strip_prefix('-').unwrap_or(name);
        if name.is_empty() || name.starts_with(['-', '=']) {
            return Err(format!("bad flag syntax: {arg}"));
        }
        let (name, value) =
            name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value.to_owned())));
        let Some(flag) = flags.iter().find(|flag| flag.names.contains(&name)) else {
            return Err(format!("flag provided but not defined: -{name}"));
        };
        let value = match value {
            Some(value) => value,
            None if flag.kind == Kind::Bool => "true".to_owned(),
            None => rest.next().cloned().ok_or_else(|| format!("flag needs an argument: -{name}"))?,
        };
        check(flag, name, &value)?;
        used.extend(flag.names.iter().copied().find(|of| *of == name));
        parsed.values.push((flag.names[0], value));
    }
    parsed.args = rest.cloned().collect();
    for flag in flags {
        let mut forms = flag.names.iter().filter(|name| used.contains(name));
        if let (Some(one), Some(other)) = (forms.next(), forms.next()) {
            return Err(format!("Cannot use two forms of the same flag: {other} {one}"));
        }
    }
    Ok(parsed)
}

fn check(flag: &Flag, name: &str, value: &str) -> Result<(), String> {
    let invalid = |why: &str| Err(format!("invalid value {} for flag -{name}: {why}", quoted(value)));
    match flag.kind {
        Kind::Text | Kind::Texts => Ok(()),
        Kind::Bool if numbers::boolean(value).is_some() => Ok(()),
        Kind::Bool => Err(format!("invalid boolean value {} for -{name}: parse error", quoted(value))),
        Kind::Int => numbers::int_of_any_base(value).map(|_| ()).or_else(|fault| invalid(fault.of_flag())),
        Kind::Ints => {
            numbers::int(value).map(|_| ()).or_else(|fault| invalid(&fault.of_conversion("ParseInt", value)))
        }
        Kind::Duration => numbers::duration(value).map_or_else(|| invalid("parse error"), |_| Ok(())),
    }
}

/// Brings flags that stand after or between the arguments before them, as most of runc's commands do.
pub fn reorder(flags: &[Flag], args: &[String]) -> Vec<String> {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut takes_value = false;
    for (at, arg) in args.iter().enumerate() {
        let flag = find(flags, arg);
        if takes_value && flag.is_none() {
            takes_value = false;
            first.push(arg.clone());
        } else if arg == "--" {
            rest.insert(0, arg.clone());
            rest.extend_from_slice(&args[at + 1..]);
            break;
        } else if let Some(flag) = flag {
            // runc takes the word after a `--all` for its value, and so confuses `kill ID --all KILL`.
            takes_value = flag.kind != Kind::Bool && !arg.contains('=');
            first.push(arg.clone());
        } else {
            rest.push(arg.clone());
        }
    }
    first.append(&mut rest);
    first
}

fn find<'a>(flags: &'a [Flag], arg: &str) -> Option<&'a Flag> {
    let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    let name = name.split('=').next().unwrap_or_default();
    flags.iter().find(|flag| flag.names.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: &[Flag] = &[
        flag(&["bundle", "b"], Kind::Text, ""),
        flag(&["all", "a"], Kind::Bool, ""),
        flag(&["n"], Kind::Int, ""),
        flag(&["gid", "g"], Kind::Ints, ""),
        flag(&["interval"], Kind::Duration, ""),
    ];

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn flags_have_every_spelling_that_go_reads() {
        for (line, name, value, args) in [
            ("-b x id", "bundle", "x", "id"),
            ("--b=x id", "bundle", "x", "id"),
            ("-bundle x id", "bundle", "x", "id"),
            ("--bundle=x=y id", "bundle", "x=y", "id"),
            ("--bundle -x id", "bundle", "-x", "id"),
            ("--all id", "all", "true", "id"),
            ("--all=F id", "all", "F", "id"),
            ("--n 0x10 -- -b y", "n", "0x10", "-b y"),
            ("-a - x", "all", "true", "- x"),
            ("--interval 1m5s", "interval", "1m5s", ""),
        ] {
            let parsed = parse(FLAGS, &words(line)).unwrap();
            assert_eq!((parsed.text(name), parsed.args.clone()), (Some(value), words(args)), "{line}");
        }
        assert_eq!(parse(FLAGS, &words("-g 1 -g 2")).unwrap().texts("gid"), ["1", "2"]);
    }

    #[test]
    fn what_is_wrong_is_said_in_gos_words() {
        for (line, said) in [
            ("--nope", "flag provided but not defined: -nope"),
            ("---b", "bad flag syntax: ---b"),
            ("--=x", "bad flag syntax: --=x"),
            ("id --nope", ""),
            ("-b", "flag needs an argument: -b"),
            ("--all=x", "invalid boolean value \"x\" for -all: parse error"),
            ("-n x", "invalid value \"x\" for flag -n: parse error"),
            (
                "-n 99999999999999999999",
                "invalid value \"99999999999999999999\" for flag -n: value out of range",
            ),
            ("-g x", "invalid value \"x\" for flag -g: strconv.ParseInt: parsing \"x\": invalid syntax"),
            ("--interval 5", "invalid value \"5\" for flag -interval: parse error"),
            ("-b x --bundle y", "Cannot use two forms of the same flag: b bundle"),
        ] {
            assert_eq!(parse(FLAGS, &words(line)).err().unwrap_or_default(), said, "{line}");
        }
    }

    #[test]
    fn flags_may_stand_after_arguments() {
        for (line, expected) in [
            ("id -b x", "-b x id"),
            ("id --all KILL", "--all id KILL"),
            ("id -- -b x", "-- id -b x"),
            ("id --nope", "id --nope"),
            ("id -b=x -", "-b=x id -"),
        ] {
            assert_eq!(reorder(FLAGS, &words(line)), words(expected), "{line}");
        }
    }
}
