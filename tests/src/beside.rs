//! The same command line given to runc and to sysbox-runc, each with a root and a bundle of its own, and what both said,
//! freed of what must differ: paths, times, the name of the program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

use crate::runtime::{Bundle, Machine, Said, programs};

/// The release that we are compared with.
pub const RUNC: &str = "1.3.6";

/// Ids are unique on this machine: runc names its cgroups by them alone.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The two runtimes.
#[derive(Debug)]
pub struct Pair {
    pub machine: Machine,
    pub ours: Side,
    pub runcs: Side,
    /// What `{id}` stands for.
    pub id: String,
}

/// One runtime and its places.
#[derive(Debug)]
pub struct Side {
    program: PathBuf,
    globals: Vec<String>,
    pub dir: PathBuf,
    pub bundle: Bundle,
}

/// The path of a program of the field, built by tests/bed/parts.sh when it is asked for first.
///
/// # Panics
/// Where it cannot be built: no Go, no network.
pub fn part(name: &str, version: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bed/parts.sh");
    let made =
        Command::new(script).args([name, version]).stdin(Stdio::null()).output().expect("run parts.sh");
    assert!(
        made.status.success(),
        "need: {name} {version}, built from its Go module: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    PathBuf::from(String::from_utf8_lossy(&made.stdout).trim())
}

impl Pair {
    /// Both, with a bundle of `args` each.
    pub fn new(args: &[&str]) -> Self {
        let runc = part("runc", RUNC);
        let machine = Machine::start();
        let id = format!("beside{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let make = |name: &str| {
            let dir = machine.path(name);
            fs::create_dir(&dir).expect("mkdir in our own directory");
            dir
        };
        let (own, theirs) = (make("side-a"), make("side-b"));
        let bundle = machine.bundle("a", args);
        let other = machine.bundle("b", args);
        // runc's own default, which is a container as it makes them; the rest as for ours.
        fs::remove_file(other.dir.join("config.json")).expect("remove our own file");
        let made =
            Command::new(&runc).arg("spec").arg("--bundle").arg(&other.dir).status().expect("run runc");
        assert!(made.success(), "runc spec failed");
        other.edit(|config| {
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(args);
            config["root"]["readonly"] = json!(false);
            config["process"]["env"] = json!(["PATH=/bin:/usr/bin", "TERM=xterm"]);
        });
        bundle.edit(|config| config["process"]["env"] = json!(["PATH=/bin:/usr/bin", "TERM=xterm"]));
        let text = |path: PathBuf| path.display().to_string();
        let ours = Side {
            program: programs().join("sysbox-runc"),
            globals: vec![
                "--root".into(),
                text(own.join("root")),
                "--run-dir".into(),
                text(machine.path("run")),
            ],
            dir: own,
            bundle,
        };
        let runcs = Side {
            program: runc,
            globals: vec!["--root".into(), text(theirs.join("root"))],
            dir: theirs,
            bundle: other,
        };
        Self { machine, ours, runcs, id }
    }

    /// Changes both configurations.
    pub fn edit(&self, mut change: impl FnMut(&mut Value)) {
        self.ours.bundle.edit(&mut change);
        self.runcs.bundle.edit(&mut change);
    }

    /// Gives a line to both; what ours and what runc said.
    pub fn both(&self, line: &str) -> (Said, Said) {
        (self.ours.say(line, &self.id), self.runcs.say(line, &self.id))
    }

    /// As [`Pair::both`], where both must succeed.
    #[track_caller]
    pub fn both_ok(&self, line: &str) -> (String, String) {
        let (ours, runcs) = self.both(line);
        assert!(runcs.code == 0, "runc {line}: {runcs:?}");
        assert!(ours.code == 0, "sysbox-runc {line}: {ours:?}");
        (ours.out, runcs.out)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for side in [&self.ours, &self.runcs] {
            let names = fs::read_dir(side.dir.join("root")).into_iter().flatten().flatten();
            for name in names {
                side.say("delete --force {id}", &name.file_name().to_string_lossy());
            }
        }
    }
}

impl Side {
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs a line of words: `{b}` is the bundle, `{d}` a directory of this side, `{id}` the id, `''` an empty word, `~` in a
    /// word a space. A line that begins with `!` comes without `--root`.
    pub fn say(&self, line: &str, id: &str) -> Said {
        self.command(line, id, None)
    }

    /// As [`Side::say`], with this on standard input.
    pub fn say_with(&self, line: &str, id: &str, input: &Path) -> Said {
        self.command(line, id, Some(input))
    }

    /// The words of a call: program, place, line.
    pub fn words(&self, line: &str, id: &str) -> Vec<String> {
        let (globals, line) = match line.strip_prefix('!') {
            Some(line) => (&[][..], line),
            None => (&self.globals[..], line),
        };
        let words = line.split_whitespace().map(|word| match word {
            "''" => String::new(),
            word => word
                .replace('~', " ")
                .replace("{b}", &self.bundle.dir.display().to_string())
                .replace("{d}", &self.dir.display().to_string())
                .replace("{id}", id),
        });
        let program = self.program.display().to_string();
        [program].into_iter().chain(globals.iter().cloned()).chain(words).collect()
    }

    fn command(&self, line: &str, id: &str, input: Option<&Path>) -> Said {
        // Files, not pipes: a container that goes on keeps its standard streams.
        let file = |name: &str| fs::File::create(self.dir.join(name)).expect("create our own file");
        let input =
            input.map_or_else(Stdio::null, |path| fs::File::open(path).expect("open our own file").into());
        let mut child = Command::new("/usr/bin/timeout")
            .args(["-k", "5", "60"])
            .args(self.words(line, id))
            .current_dir(&self.dir)
            .stdin(input)
            .stdout(file(".out"))
            .stderr(file(".err"))
            .env_remove("LISTEN_FDS")
            .env_remove("NOTIFY_SOCKET")
            .spawn()
            .expect("run a runtime");
        let code = child.wait().expect("wait for our own child").code().unwrap_or(-1);
        let read = |name: &str| self.plain(&fs::read_to_string(self.dir.join(name)).unwrap_or_default());
        Said { code, out: read(".out"), err: read(".err") }
    }

    /// A text without what is this side's own.
    fn plain(&self, text: &str) -> String {
        let own = text
            .replace(&self.program.display().to_string(), "{p}")
            .replace(&self.bundle.dir.display().to_string(), "{b}")
            .replace(&self.dir.display().to_string(), "{d}");
        let line = |line: &str| match line.strip_prefix("time=\"").and_then(|rest| rest.split_once('"')) {
            // Some of runc's messages end with a newline.
            Some((_, rest)) => format!("time=T{}", rest.replace("\\n\"", "\"")),
            None => line.to_owned(),
        };
        let lines: Vec<String> = own.lines().map(line).collect();
        lines.join("\n") + if text.ends_with('\n') { "\n" } else { "" }
    }
}

/// The shape of a document: names and kinds, without the values.
pub fn shape(document: &Value) -> Value {
    match document {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), shape(value))).collect(),
        Value::Array(all) => Value::Array(all.first().map(shape).into_iter().collect()),
        Value::String(_) => json!("text"),
        Value::Number(_) => json!(0),
        other => other.clone(),
    }
}
