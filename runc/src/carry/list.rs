//! The carried list: what the files of a data root are that an engine's layer archive does not say. A line a file: its path
//! below the directory that the list is of, and words. Bytes in, values out; every byte of a list that comes with an image is
//! input.

use std::ffi::{CString, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// The list's file, in the data root or in the directory of an inner layer.
pub const NAME: &str = ".sysbox-carried";
/// Its first line.
pub const HEAD: &[u8] = b"sysbox carried 1\n";
/// The longest line there can be: a path and the attributes of one file, each in digits.
pub const LONGEST_LINE: usize = 4 * 4096 + 3 * 2 * 65536;

/// Attributes that the kernel's overlay sets for the disk that it is on; on another they would be wrong.
const OF_THIS_DISK: &[&[u8]] = &[
    b"user.overlay.origin",
    b"user.overlay.impure",
    b"user.overlay.nlink",
    b"user.overlay.upper",
    b"user.overlay.uuid",
];

/// Attributes that an archive drops and that are the file's own. `security.capability` is not among them: archives keep it.
pub fn is_carried(name: &[u8]) -> bool {
    let posix = matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default");
    posix || (name.starts_with(b"user.") && !OF_THIS_DISK.contains(&name))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Something that an archive brings.
    #[default]
    Archived,
    /// An inner layer's: an engine that archives by comparing does not see it.
    Whiteout,
    Socket {
        mode: u32,
        uid: u32,
        gid: u32,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// Relative, without `..`; empty for the directory itself.
    pub path: PathBuf,
    pub kind: Kind,
    /// Seconds and nanoseconds, where the latter are not 0: archives drop them.
    pub mtime: Option<(i64, u32)>,
    pub attributes: Vec<(CString, Vec<u8>)>,
}

impl Entry {
    /// Whether there is anything that an archive would not say.
    pub fn is_needed(&self) -> bool {
        self.kind != Kind::Archived || self.mtime.is_some() || !self.attributes.is_empty()
    }

    /// The line, with its newline.
    pub fn line(&self) -> String {
        let path = self.path.as_os_str().as_bytes();
        let mut line = escaped(if path.is_empty() { b"." } else { path });
        match self.kind {
            Kind::Archived => {}
            Kind::Whiteout => line.push_str(" whiteout"),
            Kind::Socket { mode, uid, gid } => put(&mut line, format_args!(" socket={mode:o},{uid},{gid}")),
        }
        if let Some((seconds, nanoseconds)) = self.mtime {
            put(&mut line, format_args!(" mtime={seconds},{nanoseconds}"));
        }
        for (name, value) in &self.attributes {
            put(&mut line, format_args!(" {}=", escaped(name.to_bytes())));
            for byte in value {
                put(&mut line, format_args!("{byte:02x}"));
            }
        }
        line.push('\n');
        line
    }

    /// A line without its newline. `None`: nothing that we wrote.
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let path = PathBuf::from(OsString::from_vec(plain(words.next()?)?));
        let path = if path == Path::new(".") { PathBuf::new() } else { path };
        if !path.components().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        let mut entry = Self { path, ..Self::default() };
        for word in words {
            if word == b"whiteout" {
                entry.kind = Kind::Whiteout;
                continue;
            }
            let at = word.iter().position(|byte| *byte == b'=')?;
            let (name, value) = (plain(&word[..at])?, &word[at + 1..]);
            match name.as_slice() {
                b"socket" => entry.kind = socket(value)?,
                b"mtime" => {
                    let (seconds, nanoseconds) = std::str::from_utf8(value).ok()?.split_once(',')?;
                    let nanoseconds = nanoseconds.parse().ok().filter(|n| *n < 1_000_000_000)?;
                    entry.mtime = Some((seconds.parse().ok()?, nanoseconds));
                }
                _ if is_carried(&name) => {
                    entry.attributes.push((CString::new(name).ok()?, from_hex(value)?));
                }
                // Not ours to set, whoever wrote it there.
                _ => return None,
            }
        }
        Some(entry)
    }
}

fn put(line: &mut String, what: std::fmt::Arguments<'_>) {
    line.write_fmt(what).expect("a string takes all that is written");
}

fn socket(value: &[u8]) -> Option<Kind> {
    let mut numbers = std::str::from_utf8(value).ok()?.split(',');
    let mode = u32::from_str_radix(numbers.next()?, 8).ok().filter(|mode| *mode <= 0o7777)?;
    let (uid, gid) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
    numbers.next().is_none().then_some(Kind::Socket { mode, uid, gid })
}

/// As the kernel writes paths into its tables: `\040` for what would break a line apart.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_graphic() && !b"\\=".contains(byte) {
            text.push(char::from(*byte));
        } else {
            put(&mut text, format_args!("\\{byte:03o}"));
        }
    }
    text
}

fn plain(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'\\' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..3)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 8).ok()?);
        rest = &rest[3..];
    }
    (!bytes.is_empty() && !bytes.contains(&0)).then_some(bytes)
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    if text.len() % 2 != 0 || text.iter().any(|byte| !byte.is_ascii_hexdigit()) {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.chunks(2).map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(path: &[u8]) -> Entry {
        Entry { path: PathBuf::from(OsString::from_vec(path.to_vec())), ..Entry::default() }
    }

    #[test]
    fn lines_say_what_was_said() {
        let attributes = vec![
            (c"user.overlay.opaque".to_owned(), b"y".to_vec()),
            (c"user.a b=c".to_owned(), vec![0, 255]),
        ];
        for (entry, line) in [
            (entry(b""), ".\n"),
            (entry(b"a b/\\=\n\xff"), "a\\040b/\\134\\075\\012\\377\n"),
            (Entry { kind: Kind::Whiteout, ..entry(b"gone") }, "gone whiteout\n"),
            (
                Entry { kind: Kind::Socket { mode: 0o755, uid: 1, gid: 2 }, ..entry(b"s") },
                "s socket=755,1,2\n",
            ),
            (Entry { mtime: Some((-1, 5)), ..entry(b"t") }, "t mtime=-1,5\n"),
            (Entry { attributes, ..entry(b"x") }, "x user.overlay.opaque=79 user.a\\040b\\075c=00ff\n"),
        ] {
            assert_eq!(entry.line(), line);
            assert_eq!(Entry::parse(line.trim_end_matches('\n').as_bytes()), Some(entry), "{line}");
        }
    }

    #[test]
    fn what_could_do_harm_is_no_line() {
        for line in [
            "../x whiteout",
            "/etc/passwd",
            "a/../b",
            "",
            "a\\0",
            "a\\000b",
            "x trusted.overlay.redirect=2f",
            "x security.capability=01",
            "x user.overlay.origin=00",
            "x user.a=0",
            "x user.a=+1",
            "x socket=17777,0,0",
            "x mtime=1,1000000000",
            "x what",
        ] {
            assert_eq!(Entry::parse(line.as_bytes()), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(entry) = Entry::parse(&line) {
                prop_assert!(entry.path.components().all(|part| matches!(part, Component::Normal(_))));
                prop_assert!(entry.attributes.iter().all(|(name, _)| is_carried(name.to_bytes())));
            }
        }

        #[test]
        fn any_name_comes_back(name in proptest::collection::vec(1_u8..=255, 1..100)) {
            prop_assume!(!name.contains(&b'/') && name != b"." && name != b"..");
            let entry = entry(&name);
            prop_assert_eq!(Entry::parse(entry.line().trim_end_matches('\n').as_bytes()), Some(entry));
        }
    }
}
