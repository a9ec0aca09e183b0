//! The bundle on disk: reads config.json and refuses what no runtime could run, naming the place by JSON pointer.
//! Knows nothing of this host.

use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use serde_json::{Map, Value};

use crate::fields;

/// A config.json above this many bytes is refused; no more is read.
const MAX_CONFIG: u64 = 16 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("chdir {}: {}", path.display(), reason(source))]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("JSON specification file config.json not found")]
    NoConfig,
    #[error("open {}: {}", path.display(), reason(source))]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is over {MAX_CONFIG} bytes", path.display())]
    TooLong { path: PathBuf },
    #[error("{}: {pointer}: {source}", path.display())]
    Parse { path: PathBuf, pointer: String, source: serde_json::Error },
    #[error("{pointer}: {why}")]
    Invalid { pointer: &'static str, why: String },
    #[error("{pointer}: an array, where an object belongs")]
    NoObject { pointer: String },
    #[error("rootfs {}: {why}", path.display())]
    Rootfs { path: PathBuf, why: String },
}

/// As Go's library says it, without the number.
pub fn reason(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// A checked bundle.
#[derive(Debug)]
pub struct Bundle {
    /// Absolute, links resolved.
    pub dir: PathBuf,
    /// Absolute; a directory and not a link.
    pub rootfs: PathBuf,
    pub spec: Spec,
    /// Members that the specification does not know, by JSON pointer.
    pub unknown: Vec<String>,
}

/// Reads and checks the bundle at `dir`.
///
/// # Errors
/// See [`BundleError`]; nothing has been done yet when it is returned.
pub fn read(dir: &Path) -> Result<Bundle, BundleError> {
    let dir = dir.canonicalize().map_err(|source| BundleError::Directory { path: dir.to_owned(), source })?;
    let path = dir.join("config.json");
    let (spec, unknown) = parse(&path, &read_text(&path)?)?;
    let rootfs = rootfs_of(&dir, &spec)?;
    Ok(Bundle { dir, rootfs, spec, unknown })
}

/// The text of a config.json into a checked spec, and the members that the specification does not know; touches no file.
///
/// # Errors
/// As [`read`]; `path` is for the words of the error.
pub fn parse(path: &Path, text: &[u8]) -> Result<(Spec, Vec<String>), BundleError> {
    let (spec, document): (Spec, _) = parse_json(path, text, "/process")?;
    refuse(&document)?;
    check(&spec)?;
    Ok((spec, fields::unknown(&document)))
}

/// Reads a process document, as `exec --process` takes it.
///
/// # Errors
/// As [`read`].
pub fn read_process(path: &Path) -> Result<Process, BundleError> {
    let (process, document): (Process, _) = parse_json(path, &read_text(path)?, "")?;
    refuse(&serde_json::json!({ "process": document }))?;
    check_process(&process)?;
    Ok(process)
}

/// # Errors
/// An array where an object belongs.
pub fn refuse_arrays(document: &Value) -> Result<(), BundleError> {
    match fields::array_for_object(document) {
        Some(pointer) if pointer.is_empty() => Err(BundleError::NoObject { pointer: "/".to_owned() }),
        Some(pointer) => Err(BundleError::NoObject { pointer }),
        None => Ok(()),
    }
}

fn refuse(document: &Value) -> Result<(), BundleError> {
    refuse_arrays(document)?;
    match fields::refused(document) {
        Some((pointer, why)) => Err(invalid(pointer, why)),
        None => Ok(()),
    }
}

fn read_text(path: &Path) -> Result<Vec<u8>, BundleError> {
    let path = path.to_owned();
    let file = match std::fs::File::open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.ends_with("config.json") => {
            return Err(BundleError::NoConfig);
        }
        opened => opened,
    };
    // Not by its size: it may be a pipe, as with runc, and a device has no end.
    let mut text = Vec::new();
    let read = file.and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut text));
    match read {
        Ok(length) if u64::try_from(length).is_ok_and(|length| length <= MAX_CONFIG) => Ok(text),
        Ok(_) => Err(BundleError::TooLong { path }),
        Err(source) => Err(BundleError::Read { path, source }),
    }
}

/// What it says, and the document itself: the types know not all that may stand in it. `process` is where the process is.
fn parse_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: &[u8],
    process: &str,
) -> Result<(T, Value), BundleError> {
    let path = path.to_owned();
    let mut document = serde_json::from_slice(text);
    let with_user = document.as_mut().ok().and_then(|document| with_a_user(document, process));
    let mut reader = serde_json::Deserializer::from_slice(with_user.as_deref().unwrap_or(text));
    let parsed = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let pointer = pointer_of(error.path());
        BundleError::Parse { path: path.clone(), pointer, source: error.into_inner() }
    })?;
    // What follows the document is a fault of this one, too.
    let whole = |source| BundleError::Parse { path, pointer: "/".to_owned(), source };
    Ok((parsed, document.map_err(whole)?))
}

/// Makes a process of which the document does not say the user root's, as runc has it. The new text; `None` where it says so.
fn with_a_user(document: &mut Value, process: &str) -> Option<Vec<u8>> {
    let process = document.pointer_mut(process)?.as_object_mut()?;
    let user = process.entry("user").or_insert_with(|| Value::Object(Map::new())).as_object_mut()?;
    let missing: Vec<&str> = ["uid", "gid"].into_iter().filter(|id| !user.contains_key(*id)).collect();
    if missing.is_empty() {
        return None;
    }
    missing.into_iter().for_each(|id| drop(user.insert(id.to_owned(), 0.into())));
    serde_json::to_vec(document).ok()
}

/// RFC 6901.
fn pointer_of(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path.iter() {
        pointer.push('/');
        match segment {
            Segment::Seq { index } => pointer.push_str(&index.to_string()),
            Segment::Map { key } => pointer.push_str(&key.replace('~', "~0").replace('/', "~1")),
            Segment::Enum { variant } => pointer.push_str(variant),
            Segment::Unknown => pointer.push('?'),
        }
    }
    if pointer.is_empty() { "/".to_owned() } else { pointer }
}

fn invalid(pointer: &'static str, why: impl Into<String>) -> BundleError {
    BundleError::Invalid { pointer, why: why.into() }
}

fn check(spec: &Spec) -> Result<(), BundleError> {
    if !spec.version().starts_with("1.") {
        return Err(invalid(
            "/ociVersion",
            format!("`{}` is not a version 1 of the specification", spec.version()),
        ));
    }
    let process = spec.process().as_ref().ok_or_else(|| invalid("/process", "is missing"))?;
    check_process(process)?;
    let linux = spec.linux().as_ref().ok_or_else(|| invalid("/linux", "is missing"))?;
    if spec.root().is_none() {
        return Err(invalid("/root", "is missing"));
    }
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    for (at, namespace) in namespaces.iter().enumerate() {
        if namespaces[..at].iter().any(|other| other.typ() == namespace.typ()) {
            return Err(invalid("/linux/namespaces", format!("`{}` is listed twice", namespace.typ())));
        }
    }
    let has = |typ: LinuxNamespaceType| namespaces.iter().any(|namespace| namespace.typ() == typ);
    if !has(LinuxNamespaceType::Network) {
        return Err(invalid("/linux/namespaces", HOST_NETWORK));
    }
    let shared: Vec<&str> = [
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Mount, "mount"),
    ]
    .into_iter()
    .filter(|(typ, _)| !has(*typ))
    .map(|(_, name)| name)
    .collect();
    if !shared.is_empty() {
        let why = format!("sysbox containers can't share namespaces {{{}}} with the host", shared.join(" "));
        return Err(invalid("/linux/namespaces", why));
    }
    for (at, mount) in spec.mounts().iter().flatten().enumerate() {
        let destination = mount.destination();
        if !destination.is_absolute() {
            let why = format!("destination of mount {at}, `{}`, is not absolute", destination.display());
            return Err(invalid("/mounts", why));
        }
    }
    Ok(())
}

/// The namespace may also come by path, which only a look at it tells.
pub const HOST_NETWORK: &str = "sysbox containers can't share a network namespace with the host \
    (because they use the linux user-namespace for isolation)";

fn check_process(process: &Process) -> Result<(), BundleError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("/process/args", "must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid(
            "/process/cwd",
            format!("`{}` is not an absolute path", process.cwd().display()),
        ));
    }
    let nul = |text: &String| text.contains('\0');
    if process.args().iter().flatten().any(nul) || process.env().iter().flatten().any(nul) {
        return Err(invalid("/process", "a NUL byte in args or env"));
    }
    Ok(())
}

fn rootfs_of(dir: &Path, spec: &Spec) -> Result<PathBuf, BundleError> {
    let named = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let path = dir.join(named);
    let wrong = |why: String| BundleError::Rootfs { path: path.clone(), why };
    let facts = std::fs::symlink_metadata(&path).map_err(|error| wrong(error.to_string()))?;
    if facts.is_symlink() {
        return Err(wrong("is a symbolic link; name the directory itself".to_owned()));
    }
    if !facts.is_dir() {
        return Err(wrong("is not a directory".to_owned()));
    }
    let path = path.canonicalize().map_err(|error| wrong(error.to_string()))?;
    if path == Path::new("/") {
        return Err(wrong("is the root of the host".to_owned()));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}]},
        })
    }

    /// Writes a bundle whose config.json is `config`, reads it, and gives the error text.
    fn refusal(config: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let shown = format!("{}/", dir.path().canonicalize().unwrap().display());
        read(dir.path()).map_or_else(|error| error.to_string().replace(&shown, ""), |_| "fine".to_owned())
    }

    #[test]
    fn faults_are_named_by_pointer() {
        let with = |pointer: &str, value: Value| {
            let mut config = good();
            *config.pointer_mut(pointer).unwrap() = value;
            refusal(&config.to_string())
        };
        assert_eq!(refusal(&good().to_string()), "fine");
        for (pointer, value, expected) in [
            ("/ociVersion", json!("2.0"), "/ociVersion: `2.0` is not a version 1 of the specification"),
            ("/process/args", json!([]), "/process/args: must not be empty"),
            ("/process/cwd", json!("x"), "/process/cwd: `x` is not an absolute path"),
            ("/process/args/0", json!("a\u{0}b"), "/process: a NUL byte in args or env"),
            ("/linux/namespaces/4", json!({"type": "pid"}), "/linux/namespaces: `pid` is listed twice"),
            (
                "/mounts/0/destination",
                json!("proc"),
                "/mounts: destination of mount 0, `proc`, is not absolute",
            ),
            ("/root/path", json!("gone"), "rootfs gone: No such file or directory (os error 2)"),
            ("/root/path", json!("config.json"), "rootfs config.json: is not a directory"),
            ("/root/path", json!("/"), "rootfs /: is the root of the host"),
        ] {
            assert_eq!(with(pointer, value), expected);
        }
    }

    #[test]
    fn a_wrong_type_is_named_by_pointer_and_place() {
        let mut config = good();
        config["mounts"][0]["options"] = json!("ro");
        let text = refusal(&config.to_string());
        assert!(text.starts_with("config.json: /mounts/0/options: invalid type: string \"ro\""), "{text}");
        let text = refusal("{\"ociVersion\": ");
        assert!(text.contains("EOF while parsing"), "{text}");
        let text = refusal(&format!("{} x", good()));
        assert!(text.starts_with("config.json: /: trailing characters"), "{text}");
    }

    #[test]
    fn a_process_without_a_user_is_roots() {
        let path = Path::new("config.json");
        for (user, ids) in [
            (None, (0, 0)),
            (Some(json!({})), (0, 0)),
            (Some(json!({"uid": 5})), (5, 0)),
            (Some(json!({"gid": 6, "uid": 5})), (5, 6)),
        ] {
            let mut config = good();
            config["process"].as_object_mut().unwrap().remove("user");
            if let Some(user) = user {
                config["process"]["user"] = user;
            }
            let (spec, _) = parse(path, config.to_string().as_bytes()).unwrap();
            let user = spec.process().as_ref().unwrap().user().clone();
            assert_eq!((user.uid(), user.gid()), ids);
            let process = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(process.path(), config["process"].to_string()).unwrap();
            let user = read_process(process.path()).unwrap().user().clone();
            assert_eq!((user.uid(), user.gid()), ids);
        }
        let mut config = good();
        config["process"]["user"] = json!("root");
        assert!(refusal(&config.to_string()).contains("/process/user"));
    }

    #[test]
    fn a_config_without_an_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            read(dir.path()).unwrap_err().to_string(),
            "JSON specification file config.json not found"
        );
        std::os::unix::fs::symlink("/dev/zero", dir.path().join("config.json")).unwrap();
        assert!(matches!(read(dir.path()), Err(BundleError::TooLong { .. })));
    }

    #[test]
    fn the_host_network_is_refused_in_words_that_users_know() {
        let mut config = good();
        config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "network"}]);
        assert_eq!(
            refusal(&config.to_string()),
            "/linux/namespaces: sysbox containers can't share namespaces {pid ipc uts} with the host"
        );
        config["linux"]["namespaces"] = json!([{"type": "mount"}]);
        assert!(refusal(&config.to_string()).contains("can't share a network namespace with the host"));
    }

    #[test]
    fn a_rootfs_that_is_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/usr", dir.path().join("rootfs")).unwrap();
        std::fs::write(dir.path().join("config.json"), good().to_string()).unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("is a symbolic link"));
    }

    #[test]
    fn a_rootfs_that_is_none_or_the_hosts_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let up = "../".repeat(64);
        for (root, why) in [
            ("/", "is the root of the host"),
            ("/proc/self/root/.", "is the root of the host"),
            (up.as_str(), "is the root of the host"),
            ("/proc/self/root", "is a symbolic link"),
            ("file", "is not a directory"),
            ("gone", "No such file"),
            ("a\u{0}b", "NUL byte"),
        ] {
            let mut config = good();
            config["root"]["path"] = json!(root);
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let text = read(dir.path()).unwrap_err().to_string();
            assert!(text.starts_with("rootfs ") && text.contains(why), "{root:?}: {text}");
        }
    }
}
