//! Records on disk: `DATA_ROOT/records/<slug>.json`, one container a file. Knows nothing of what they mean.
//!
//! A file is lines of JSON, each the whole record as it was then; the last line that ends counts. So a change is one append
//! (6 µs on ext4, where replacing a file by rename takes 180), and one that was cut off, by a full disk or by the power,
//! leaves the line before it in force.
//!
//! When `write` returns, a kill -9 of anybody loses nothing. The disk has it within [`FLUSH_AFTER`], by a thread of its
//! own: what a power cut in that time takes away is a choice of ids for a container that the power cut ended too (files
//! carry ids from 0 on, on disk). docs/decisions says more.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use sysbox_ipc::mgr::Record;
use sysbox_ipc::{ContainerKey, IdMap, IdRange};
use tracing::{error, warn};

use crate::ledger::{Foreign, RECORD_VERSION, ranges};

/// Longest time a record waits for its fsync; records written in it share one.
pub const FLUSH_AFTER: Duration = Duration::from_millis(500);

/// Beyond this a file is begun anew: some 40 changes.
const LONGEST_FILE: u64 = 32 * 1024;

#[derive(Debug, thiserror::Error)]
#[error("{what} {}", path.display())]
pub struct StoreError {
    what: &'static str,
    path: PathBuf,
    #[source]
    cause: io::Error,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |cause| StoreError { what, path: path.to_owned(), cause }
}

#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Slugs of files that are not ours to rewrite.
    blocked: BTreeSet<String>,
    flusher: Option<(mpsc::Sender<PathBuf>, JoinHandle<()>)>,
}

/// What was found at start.
#[derive(Debug, Default)]
pub struct Loaded {
    pub records: Vec<Record>,
    pub foreign: Vec<Foreign>,
}

impl Store {
    /// # Errors
    /// The directory of records cannot be made or read, or no thread be started.
    pub fn open(data_root: &Path) -> Result<(Self, Loaded), StoreError> {
        let dir = data_root.join("records");
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .recursive(true)
            .create(&dir)
            .map_err(failed("mkdir", &dir))?;
        let mut store = Self { blocked: BTreeSet::new(), flusher: None, dir };
        let loaded = store.load()?;
        let (sender, receiver) = mpsc::channel();
        let dir = store.dir.clone();
        let thread = std::thread::Builder::new()
            .name("flusher".into())
            .stack_size(128 * 1024)
            .spawn(move || flush_as_told(&dir, &receiver))
            .map_err(failed("start a thread to flush", &store.dir))?;
        store.flusher = Some((sender, thread));
        Ok((store, loaded))
    }

    fn load(&mut self) -> Result<Loaded, StoreError> {
        let mut loaded = Loaded::default();
        for entry in std::fs::read_dir(&self.dir).map_err(failed("list", &self.dir))? {
            let path = entry.map_err(failed("list", &self.dir))?.path();
            let Some(slug) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) else {
                continue;
            };
            match std::fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|bytes| judge(&bytes, slug))
            {
                Ok(Some(record)) => loaded.records.push(record),
                // A power cut before the first fsync leaves a name without content: there is nothing to preserve.
                Ok(None) => {
                    warn!(path = %path.display(), "empty record of a container that a power cut ended")
                }
                Err(why) => {
                    let foreign = std::fs::read(&path).map(|bytes| salvage(&bytes)).unwrap_or_default();
                    error!(path = %path.display(), why, kept = ?foreign, "unusable record: left as it is, its ids stay taken");
                    self.blocked.insert(slug.to_owned());
                    loaded.foreign.push(foreign);
                }
            }
        }
        Ok(loaded)
    }

    /// The file that must not be rewritten and keeps this container from being registered, if there is one.
    pub fn blocks(&self, key: &ContainerKey) -> Option<PathBuf> {
        let slug = key.slug();
        self.blocked.contains(&slug).then(|| self.path(&slug))
    }

    /// Whether a file of this name is there that we cannot use.
    pub fn is_blocked(&self, slug: &str) -> bool {
        self.blocked.contains(slug)
    }

    /// Makes this the record of its container.
    ///
    /// # Errors
    /// The disk being full, and the like. The older record is then still in force.
    pub fn write(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.path(&record.key.slug());
        // The newline before it ends a line that was cut off.
        let mut line = b"\n".to_vec();
        serde_json::to_writer(&mut line, record).map_err(io::Error::from).map_err(failed("write", &path))?;
        line.push(b'\n');
        let mut file = append_to(&path).map_err(failed("open", &path))?;
        let size = file.metadata().map_err(failed("stat", &path))?.len();
        if size > LONGEST_FILE {
            self.replace(&path, &line)?;
        } else if let Err(error) = file.write_all(&line) {
            // What got into the file is not a line yet; if it cannot be cut off, the next append ends it. A file that holds
            // nothing else goes: on a full disk it is all that there is of a container that was refused.
            let undone = if size == 0 { std::fs::remove_file(&path) } else { file.set_len(size) };
            if let Err(error) = undone {
                warn!(path = %path.display(), %error, "take back a line that was cut off");
            }
            return Err(failed("append to", &path)(error));
        }
        self.flush(path);
        Ok(())
    }

    fn replace(&self, path: &Path, line: &[u8]) -> Result<(), StoreError> {
        let new = self.dir.join(".new");
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(line)?;
            file.sync_data()
        };
        write().map_err(failed("write", &new))?;
        std::fs::rename(&new, path).map_err(failed("rename to", path))
    }

    /// # Errors
    /// What unlink(2) says. That there is no such file is no error.
    pub fn remove(&self, key: &ContainerKey) -> Result<(), StoreError> {
        let path = self.path(&key.slug());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("unlink", &path)(error)),
            _ => {
                self.flush(path);
                Ok(())
            }
        }
    }

    fn path(&self, slug: &str) -> PathBuf {
        self.dir.join(format!("{slug}.json"))
    }

    fn flush(&self, path: PathBuf) {
        let told = self.flusher.as_ref().map(|(sender, _)| sender.send(path));
        if let Some(Err(error)) = told {
            error!(%error, "the thread that flushes records is gone");
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.flusher.take() {
            drop(sender);
            if thread.join().is_err() {
                error!("the thread that flushes records panicked");
            }
        }
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    std::os::unix::fs::OpenOptionsExt::mode(File::options().append(true).create(true), 0o600).open(path)
}

/// The last line that ends.
fn last_line(bytes: &[u8]) -> Option<&[u8]> {
    let mut lines = bytes.rsplit(|byte| *byte == b'\n');
    lines.next();
    lines.find(|line| !line.is_empty())
}

/// A record, nothing (no line was ever finished), or why the file is unusable.
fn judge(bytes: &[u8], slug: &str) -> Result<Option<Record>, String> {
    let Some(line) = last_line(bytes) else { return Ok(None) };
    let value: Value = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(RECORD_VERSION) => {}
        Some(version) => {
            return Err(format!("format version {version}; this sysbox-mgr knows {RECORD_VERSION}"));
        }
        None => return Err("no format version".to_owned()),
    }
    let record: Record = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let named = record.key.slug();
    if named == slug { Ok(Some(record)) } else { Err(format!("it is the record of `{named}`")) }
}

/// Ids and slot of a record of another version or with a broken part; nothing of what is no JSON at all. (Ids that living
/// processes have are found by their processes: `observe::ids_in_use`.)
fn salvage(bytes: &[u8]) -> Foreign {
    let Ok(value) = serde_json::from_slice::<Value>(last_line(bytes).unwrap_or_default()) else {
        return Foreign::default();
    };
    let map = value.get("id_map").and_then(|map| serde_json::from_value::<IdMap>(map.clone()).ok());
    let ids: Vec<IdRange> = map.iter().flat_map(ranges).collect();
    let slot = value.get("slot").and_then(Value::as_u64).and_then(|slot| u32::try_from(slot).ok());
    Foreign { ids, slot }
}

fn flush_as_told(dir: &Path, receiver: &mpsc::Receiver<PathBuf>) {
    while let Ok(first) = receiver.recv() {
        let mut paths = BTreeSet::from([first]);
        let deadline = Instant::now() + FLUSH_AFTER;
        let last = loop {
            match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(path) => drop(paths.insert(path)),
                Err(RecvTimeoutError::Timeout) => break false,
                Err(RecvTimeoutError::Disconnected) => break true,
            }
        };
        for path in paths.iter().map(PathBuf::as_path).chain([dir]) {
            match File::open(path).and_then(|file| file.sync_all()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    error!(path = %path.display(), %error, "fsync failed: records may be lost if the power fails");
                }
                _ => {}
            }
        }
        if last {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sysbox_ipc::ContainerId;
    use sysbox_ipc::mgr::{Phase, Rootfs};

    fn record(id: &str) -> Record {
        Record {
            version: RECORD_VERSION,
            key: ContainerKey::new(Path::new("/run/r"), ContainerId::parse(id).unwrap()),
            slot: 3,
            id_map: IdMap::of_range(IdRange { start: 0x7003_0000, count: 65536 }).unwrap(),
            allocated: true,
            bundle: "/b".into(),
            rootfs: Rootfs::Directory { path: "/r".into() },
            layers: None,
            netns: None,
            users: None,
            claims: vec![],
            phase: Phase::Stopped,
        }
    }

    #[test]
    fn what_was_written_is_found_again() {
        let root = tempfile::tempdir().unwrap();
        let (store, loaded) = Store::open(root.path()).unwrap();
        assert!(loaded.records.is_empty());
        store.write(&record("a")).unwrap();
        store.write(&record("b")).unwrap();
        store.write(&Record { slot: 9, ..record("b") }).unwrap();
        store.write(&record("c")).unwrap();
        store.remove(&record("c").key).unwrap();
        store.remove(&record("c").key).unwrap();
        // Not dropped: a kill -9 now.
        let (_again, loaded) = Store::open(root.path()).unwrap();
        let mut found: Vec<_> = loaded.records.iter().map(|r| (r.key.id.as_str(), r.slot)).collect();
        found.sort_unstable();
        assert_eq!(found, [("a", 3), ("b", 9)]);
    }

    fn load(content: &str) -> (tempfile::TempDir, PathBuf, Store, Loaded) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("records")).unwrap();
        let path = root.path().join("records").join(format!("{}.json", record("x").key.slug()));
        std::fs::write(&path, content).unwrap();
        let (store, loaded) = Store::open(root.path()).unwrap();
        (root, path, store, loaded)
    }

    #[test]
    fn what_cannot_be_used_is_kept_and_keeps_its_ids() {
        let whole = serde_json::to_string(&record("x")).unwrap();
        let newer = whole.replace("\"version\":1", "\"version\":2");
        let ids = Foreign { ids: ranges(&record("x").id_map).collect(), slot: Some(3) };
        for (text, expected) in [
            (format!("{newer}\n"), ids.clone()),
            (format!("{whole}\n{newer}\n"), ids.clone()),
            (whole.replace("\"phase\":\"stopped\"", "\"phase\":\"dancing\"") + "\n", ids.clone()),
            (format!("{}\n", &whole[..whole.len() / 2]), Foreign::default()),
            ("[]\n".to_owned(), Foreign::default()),
        ] {
            let (_root, path, store, loaded) = load(&text);
            assert_eq!(
                (loaded.records.len(), loaded.foreign.as_slice()),
                (0, [expected].as_slice()),
                "{text}"
            );
            assert_eq!(store.blocks(&record("x").key), Some(path.clone()));
            assert_eq!(store.blocks(&record("y").key), None);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_line_that_was_cut_off_leaves_the_one_before_it_in_force() {
        let lines: Vec<String> =
            (0..3).map(|slot| serde_json::to_string(&Record { slot, ..record("x") }).unwrap()).collect();
        let half = &lines[2][..100];
        for (text, expected) in [
            (String::new(), None),
            ("\0\0\0".to_owned(), None),
            (half.to_owned(), None),
            (format!("\n{half}"), None),
            (format!("\n{}\n", lines[0]), Some(0)),
            (format!("\n{}\n\n{}\n", lines[0], lines[1]), Some(1)),
            (format!("\n{}\n\n{half}", lines[0]), Some(0)),
            (format!("\n{}\n\n{half}\0\0\0", lines[0]), Some(0)),
            (format!("\n{}\n\n{half}\n{}\n", lines[0], lines[1]), Some(1)),
        ] {
            let (root, _path, store, loaded) = load(&text);
            assert_eq!(loaded.records.first().map(|record| record.slot), expected, "{text}");
            assert!(loaded.foreign.is_empty() && store.blocks(&record("x").key).is_none());
            // And it can be written on from there.
            store.write(&Record { slot: 7, ..record("x") }).unwrap();
            drop(store);
            assert_eq!(Store::open(root.path()).unwrap().1.records[0].slot, 7);
        }
    }

    #[test]
    fn a_file_does_not_grow_for_ever() {
        let root = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(root.path()).unwrap();
        for slot in 0..500 {
            store.write(&Record { slot, ..record("x") }).unwrap();
            let path = store.path(&record("x").key.slug());
            assert!(std::fs::metadata(path).unwrap().len() < LONGEST_FILE + 4096);
        }
        assert_eq!(Store::open(root.path()).unwrap().1.records[0].slot, 499);
    }

    #[test]
    fn a_record_under_another_name_is_not_believed() {
        let bytes = serde_json::to_string(&record("x")).unwrap() + "\n";
        assert!(judge(bytes.as_bytes(), "y-0").unwrap_err().contains(&record("x").key.slug()));
    }
}
