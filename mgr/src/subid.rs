//! The ids of the user `sysbox` in /etc/subuid and /etc/subgid (subuid(5)): which they are, and where to put them if there
//! are none. `decide` works on the files' text; `ensure` is the door. Other people's lines are kept byte for byte.

use std::fmt;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sysbox_ipc::IdRange;
use sysbox_ipc::ids::DEFAULT_IDS;

/// Whose subordinate ids are ours to give away.
pub const USER: &str = "sysbox";

/// How many ids are taken when nothing else is said: 4096 containers.
pub const DEFAULT_COUNT: u32 = 1 << 28;

/// Where a new range is looked for, in this order. First the 2^28 ids between systemd's container range and 2^31, which
/// nobody assigns (<https://systemd.io/UIDS-GIDS>); then above useradd's subordinate ids, inside systemd-nspawn's range;
/// ids above 2^31 last, as some programs take ids for signed. -1 and -2 are no ids.
const PLACES: &[(u64, u64)] =
    &[(0x7000_0000, 0x8000_0000), (0x2400_0000, 0x7000_0000), (0x8000_0000, 0xfffe_0000)];

/// What the command line asks for where the files say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Count(u32),
    Exactly(IdRange),
}

impl std::str::FromStr for Wanted {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u32>().map_err(|error| format!("`{text}`: {error}"));
        let count = |text: &str| match number(text)? {
            count if count < DEFAULT_IDS => {
                Err(format!("{count} ids are fewer than one container needs ({DEFAULT_IDS})"))
            }
            count => Ok(count),
        };
        let Some((start, rest)) = text.split_once(':') else { return count(text).map(Self::Count) };
        let range = IdRange { start: number(start)?, count: count(rest)? };
        if range.start == 0 || range.end() > u64::from(u32::MAX) {
            return Err(format!("{range:?} is not within 1..4294967294"));
        }
        Ok(Self::Exactly(range))
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Exactly(range) => write!(f, "{}:{}", range.start, range.count),
        }
    }
}

/// The bytes of the four files; an absent file is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Texts {
    pub subuid: Vec<u8>,
    pub subgid: Vec<u8>,
    pub passwd: Vec<u8>,
    pub group: Vec<u8>,
}

/// The range to use, and the files that lack the line for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    pub range: IdRange,
    pub add_to_subuid: bool,
    pub add_to_subgid: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum SubidError {
    #[error("the `{USER}` lines of {0} and {1} have no run of {DEFAULT_IDS} ids in common\nhint: make them equal", FILES[0], FILES[1])]
    Disjoint,
    #[error("ids {} of user `{USER}` in {file} are also those of {other}\nhint: give one of them other ids; two users of one id can read and kill each other's processes", show(*range))]
    Collision { file: &'static str, range: IdRange, other: String },
    #[error("no free run of {count} ids for user `{USER}` beside the lines of {0} and {1}\nhint: start with a smaller `--subid-range COUNT`, or name a place: `--subid-range START:COUNT`", FILES[0], FILES[1])]
    NoRoom { count: u32 },
    #[error("{what} {}", path.display())]
    File {
        what: &'static str,
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("lock {}: process {holder} is editing the file\nhint: if it is not, remove the lock file", path.display())]
    Locked { path: PathBuf, holder: String },
}

const FILES: [&str; 4] = ["subuid", "subgid", "passwd", "group"];

fn show(range: IdRange) -> String {
    format!("{}..{}", range.start, range.end())
}

struct Line {
    user: String,
    range: IdRange,
}

/// Lines `name:start:count`; what is not of that form is nobody's range.
fn sub_lines(text: &[u8]) -> Vec<Line> {
    let line = |line: &[u8]| {
        let line = String::from_utf8_lossy(line).into_owned();
        let mut parts = line.trim().split(':');
        let (user, start, count) = (parts.next()?, parts.next()?, parts.next()?);
        let range = IdRange { start: start.parse().ok()?, count: count.parse().ok()? };
        (range.count > 0 && parts.next().is_none()).then(|| Line { user: user.to_owned(), range })
    };
    text.split(|byte| *byte == b'\n').filter_map(line).collect()
}

/// Name and id of each account: first and third field of passwd(5) and group(5).
fn accounts(text: &[u8]) -> Vec<(String, u32)> {
    let account = |line: &[u8]| {
        let line = String::from_utf8_lossy(line).into_owned();
        let mut parts = line.split(':');
        let (name, id) = (parts.next()?, parts.nth(1)?);
        Some((name.to_owned(), id.parse().ok()?))
    };
    text.split(|byte| *byte == b'\n').filter_map(account).collect()
}

/// Which ids are ours, and what is to be written for that.
///
/// # Errors
/// Ids that somebody else has as well, lines of the two files that do not agree, no room.
pub fn decide(texts: &Texts, wanted: Wanted) -> Result<Decision, SubidError> {
    let (users, groups) = (accounts(&texts.passwd), accounts(&texts.group));
    let our_number = users.iter().find(|(name, _)| name == USER).map(|(_, id)| id.to_string());
    let is_ours = |line: &Line| line.user == USER || Some(&line.user) == our_number.as_ref();
    let (uid_lines, gid_lines) = (sub_lines(&texts.subuid), sub_lines(&texts.subgid));
    let mut taken: Vec<(IdRange, String)> = Vec::new();
    for (file, lines) in [(FILES[0], &uid_lines), (FILES[1], &gid_lines)] {
        let others = lines.iter().filter(|line| !is_ours(line));
        taken.extend(others.map(|line| (line.range, format!("`{}` in {file}", line.user))));
    }
    for (file, ids) in [(FILES[2], &users), (FILES[3], &groups)] {
        taken.extend(
            ids.iter().map(|(name, id)| (IdRange { start: *id, count: 1 }, format!("`{name}` in {file}"))),
        );
    }

    let ours =
        |lines: &[Line]| lines.iter().filter(|line| is_ours(line)).map(|line| line.range).collect::<Vec<_>>();
    let (uids, gids) = (ours(&uid_lines), ours(&gid_lines));
    let (range, file) = match (uids.as_slice(), gids.as_slice()) {
        ([], []) => match wanted {
            Wanted::Exactly(range) => (range, "--subid-range"),
            Wanted::Count(count) => (free_run(&taken, count).ok_or(SubidError::NoRoom { count })?, FILES[0]),
        },
        (uids, []) => (largest(uids.iter().copied())?, FILES[0]),
        ([], gids) => (largest(gids.iter().copied())?, FILES[1]),
        (uids, gids) => {
            let common = uids.iter().flat_map(|u| gids.iter().filter_map(|g| intersection(*u, *g)));
            (largest(common)?, FILES[0])
        }
    };
    if let Some((_, other)) = taken.into_iter().find(|(other, _)| other.overlaps(range)) {
        return Err(SubidError::Collision { file, range, other });
    }
    Ok(Decision { range, add_to_subuid: uids.is_empty(), add_to_subgid: gids.is_empty() })
}

fn intersection(one: IdRange, two: IdRange) -> Option<IdRange> {
    let start = one.start.max(two.start);
    let count = one.end().min(two.end()).checked_sub(u64::from(start))?;
    Some(IdRange { start, count: u32::try_from(count).ok()? })
}

fn largest(ranges: impl Iterator<Item = IdRange>) -> Result<IdRange, SubidError> {
    // An id of 0 or of 2^32-1 cannot be in a map; whoever wrote such a line cannot mean it for us.
    let usable =
        |range: &IdRange| range.count >= DEFAULT_IDS && range.start > 0 && range.end() <= u64::from(u32::MAX);
    ranges.filter(usable).max_by_key(|range| range.count).ok_or(SubidError::Disjoint)
}

fn free_run(taken: &[(IdRange, String)], count: u32) -> Option<IdRange> {
    PLACES.iter().find_map(|(low, high)| {
        let mut start = *low;
        while start + u64::from(count) <= *high {
            let range = IdRange { start: u32::try_from(start).ok()?, count };
            match taken.iter().filter(|(other, _)| other.overlaps(range)).map(|(other, _)| other.end()).max()
            {
                None => return Some(range),
                Some(end) => start = end.next_multiple_of(u64::from(DEFAULT_IDS)),
            }
        }
        None
    })
}

/// The range of user `sysbox` as the files in `dir` (/etc) say it, after writing it to those that do not.
///
/// # Errors
/// As [`decide`], and what reading, locking or replacing a file says.
pub fn ensure(dir: &Path, wanted: Wanted) -> Result<IdRange, SubidError> {
    let decision = decide(&read(dir)?, wanted)?;
    if !decision.add_to_subuid && !decision.add_to_subgid {
        return Ok(decision.range);
    }
    // Once more, with useradd(8) and usermod(8) kept out.
    let _locks = [Lock::take(dir, FILES[0])?, Lock::take(dir, FILES[1])?];
    let texts = read(dir)?;
    let decision = decide(&texts, wanted)?;
    let line = format!("{USER}:{}:{}\n", decision.range.start, decision.range.count);
    for (file, text, add) in
        [(FILES[0], &texts.subuid, decision.add_to_subuid), (FILES[1], &texts.subgid, decision.add_to_subgid)]
    {
        if add {
            replace(&dir.join(file), &with_line(text, &line))?;
        }
    }
    Ok(decision.range)
}

fn with_line(text: &[u8], line: &str) -> Vec<u8> {
    let mut new = text.to_vec();
    if !new.is_empty() && !new.ends_with(b"\n") {
        new.push(b'\n');
    }
    new.extend_from_slice(line.as_bytes());
    new
}

fn read(dir: &Path) -> Result<Texts, SubidError> {
    let file = |name: &str| {
        let path = dir.join(name);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|cause| SubidError::File { what: "read", path, cause }),
        }
    };
    Ok(Texts {
        subuid: file(FILES[0])?,
        subgid: file(FILES[1])?,
        passwd: file(FILES[2])?,
        group: file(FILES[3])?,
    })
}

/// Replaces a file in one step; mode and owner stay.
fn replace(path: &Path, text: &[u8]) -> Result<(), SubidError> {
    // Where the file is a link, what it names is replaced, not the link.
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let new = path.with_extension("sysbox-new");
    let write = || {
        let mut file = std::fs::File::create(&new)?;
        let (mode, uid, gid) = match std::fs::metadata(&path) {
            Ok(old) => (old.mode() & 0o7777, old.uid(), old.gid()),
            Err(_) => (0o644, 0, 0),
        };
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.write_all(text)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)
    };
    write().map_err(|cause| SubidError::File { what: "replace", path: path.clone(), cause })
}

/// The lock file of shadow's tools: `subuid.lock` holds the pid of whoever edits `subuid`.
struct Lock(PathBuf);

impl Lock {
    fn take(dir: &Path, file: &str) -> Result<Self, SubidError> {
        let path = dir.join(format!("{file}.lock"));
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match std::fs::File::options().write(true).create_new(true).open(&path) {
                Ok(mut lock) => {
                    let written = write!(lock, "{}", std::process::id());
                    let lock = Self(path.clone());
                    return written.map(|()| lock).map_err(|cause| SubidError::File {
                        what: "lock",
                        path,
                        cause,
                    });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(cause) => return Err(SubidError::File { what: "lock", path, cause }),
            }
            let holder = std::fs::read_to_string(&path).unwrap_or_default();
            let holder = holder.trim_end_matches(['\0', '\n']).to_owned();
            let dead = holder.parse::<u32>().is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if dead {
                // As shadow does: a lock of a dead process is nobody's. If the removal fails, the next try says why.
                drop(std::fs::remove_file(&path));
            } else if Instant::now() > deadline {
                return Err(SubidError::Locked { path, holder });
            } else {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "lock file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEFAULT: Wanted = Wanted::Count(DEFAULT_COUNT);

    fn range(start: u32, count: u32) -> IdRange {
        IdRange { start, count }
    }

    fn texts(subuid: &str, subgid: &str, passwd: &str) -> Texts {
        Texts {
            subuid: subuid.into(),
            subgid: subgid.into(),
            passwd: passwd.into(),
            group: b"root:x:0:\n".to_vec(),
        }
    }

    #[test]
    fn the_range_is_the_files_or_a_free_one() {
        let top = range(0x7000_0000, 1 << 28);
        for (subuid, subgid, passwd, expected) in [
            ("", "", "", (top, true, true)),
            ("joe:100000:65536\n", "joe:100000:65536", "joe:x:1000:1000::/:\n", (top, true, true)),
            (
                "# words\nsysbox:165536:65536\n",
                "sysbox:165536:65536",
                "",
                (range(165_536, 65536), false, false),
            ),
            ("1:2:3\nsysbox:165536:65536", "", "", (range(165_536, 65536), false, true)),
            ("", "990:200000:65536", "sysbox:x:990:990::/:", (range(200_000, 65536), true, false)),
            ("sysbox:100000:200000", "sysbox:120000:200000", "", (range(120_000, 180_000), false, false)),
            ("x:2000000000:1\n", "", "", (range(0x2400_0000, 1 << 28), true, true)),
            ("", "x:600000000:10000000\n", "y:x:2000000000:1::/:", (range(0x245c_0000, 1 << 28), true, true)),
        ] {
            let decided = decide(&texts(subuid, subgid, passwd), DEFAULT).unwrap();
            assert_eq!(
                (decided.range, decided.add_to_subuid, decided.add_to_subgid),
                expected,
                "{subuid:?} {subgid:?}"
            );
        }
    }

    #[test]
    fn a_clash_names_both_sides() {
        for (subuid, passwd, wanted, message) in [
            (
                "sysbox:165536:65536\njoe:200000:65536\n",
                "",
                DEFAULT,
                "ids 165536..231072 of user `sysbox` in subuid are also those of `joe` in subuid",
            ),
            (
                "sysbox:165536:65536\n",
                "joe:x:165600:1::/:",
                DEFAULT,
                "ids 165536..231072 of user `sysbox` in subuid are also those of `joe` in passwd",
            ),
            (
                "joe:200000:65536\n",
                "",
                Wanted::Exactly(range(131_072, 131_072)),
                "ids 131072..262144 of user `sysbox` in --subid-range are also those of `joe` in subuid",
            ),
        ] {
            let error = decide(&texts(subuid, "", passwd), wanted).unwrap_err().to_string();
            assert_eq!(error.lines().next(), Some(message));
            assert!(error.lines().nth(1).unwrap().starts_with("hint: "));
        }
    }

    #[test]
    fn too_little_is_refused() {
        assert!(matches!(decide(&texts("sysbox:1:100", "", ""), DEFAULT), Err(SubidError::Disjoint)));
        assert!(matches!(
            decide(&texts("sysbox:1:99999", "sysbox:200000:99999", ""), DEFAULT),
            Err(SubidError::Disjoint)
        ));
        let all = texts("x:1:4294967290", "", "");
        assert!(matches!(decide(&all, DEFAULT), Err(SubidError::NoRoom { .. })));
        for bad in ["", "x", "1", "65535", "0:65536", "4294901760:65536", "1:2:3"] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
        assert_eq!("131072:65536".parse(), Ok(Wanted::Exactly(range(131_072, 65536))));
    }

    #[test]
    fn the_files_keep_their_lines_mode_and_owner() {
        let dir = tempfile::tempdir().unwrap();
        let subuid = dir.path().join("subuid");
        std::fs::write(&subuid, b"# \xff words \njoe:100000:65536").unwrap();
        std::fs::set_permissions(&subuid, std::fs::Permissions::from_mode(0o640)).unwrap();
        let given = ensure(dir.path(), DEFAULT).unwrap();
        assert_eq!(given, range(0x7000_0000, 1 << 28));
        let line = b"sysbox:1879048192:268435456\n";
        let expected = [b"# \xff words \njoe:100000:65536\n".as_slice(), line].concat();
        assert_eq!(std::fs::read(&subuid).unwrap(), expected);
        assert_eq!(std::fs::metadata(&subuid).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read(dir.path().join("subgid")).unwrap(), line);
        assert_eq!(ensure(dir.path(), Wanted::Count(65536)).unwrap(), given, "what is there is used");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "nothing left beside the files");
    }

    #[test]
    fn the_lock_of_a_dead_editor_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("subuid.lock"), "4194304999\0").unwrap();
        std::fs::write(dir.path().join("subgid.lock"), "4194305\0").unwrap();
        ensure(dir.path(), DEFAULT).unwrap();
    }

    proptest! {
        #[test]
        fn a_new_range_touches_nobody(lines in proptest::collection::vec((1u32..u32::MAX, 1u32..1 << 30), 0..6)) {
            let text: String = lines.iter().map(|(start, count)| format!("x:{start}:{count}\n")).collect();
            if let Ok(Decision { range, .. }) = decide(&texts(&text, "", "u:x:1900000000:1::/:"), DEFAULT) {
                for (start, count) in lines {
                    let other = IdRange { start, count };
                    prop_assert!(!range.overlaps(other));
                }
                prop_assert!(!range.contains(1_900_000_000) && range.end() <= 0xffff_fffe);
            }
        }
    }
}
