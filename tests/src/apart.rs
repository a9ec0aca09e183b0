//! A machine apart (tests/bed/apart.sh): a shell in namespaces of its own, for what would disturb this machine or be
//! disturbed by it. Ends with the test, and all that was started in it. Owns no expectation.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::runtime::programs;

/// The source tree.
pub fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("tests are a folder of the tree").to_owned()
}

/// A shell on a machine apart, with the built programs and this source tree.
#[derive(Debug)]
pub struct Apart {
    shell: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// What a script printed, both streams, and how it ended.
#[derive(Debug)]
pub struct Told {
    pub script: String,
    pub code: i32,
    pub text: String,
}

impl Told {
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}\n{}", self.script, self.text);
        self.text
    }

    #[track_caller]
    pub fn fails(self) -> String {
        assert_ne!(self.code, 0, "succeeded: {}\n{}", self.script, self.text);
        self.text
    }
}

/// Reads scripts, each ended by a NUL; says after each what it printed, NUL, its status, NUL. By a file: a daemon that keeps
/// a stream open must not keep us waiting. 124 is a script that hung.
const LOOP: &str = r#"while IFS= read -r -d "" script; do
    status=0
    timeout 80 bash -c "$script" </dev/null >/run/said 2>&1 || status=$?
    cat /run/said
    printf '\0%s\0' "$status"
done"#;

/// Before each script. As a user calls it, and not as a part of the `make test` that we are in.
const HEAD: &str = "cd /opt/tree; unset MAKEFLAGS MAKELEVEL MFLAGS BED SUITE VM DOCKER_HOST\n";

impl Apart {
    #[track_caller]
    pub fn start() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "need: root");
        let (top, programs) = (top(), programs());
        let mut command = Command::new(top.join("tests/bed/apart.sh"));
        command.args(["--bind", &format!("{}:/opt/tree", top.display())]);
        command.args(["--bind", &format!("{}:/opt/programs", programs.display())]);
        command.args(["bash", "-c", LOOP]);
        // The programs are built and all is installed: these tests are of the rest.
        command.env("SKIP_BUILD", "1").env("SKIP_INSTALL", "1").env("BIN_DIR", "/opt/programs");
        let mut shell = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start apart.sh");
        let (input, output) = (shell.stdin.take(), shell.stdout.take().expect("piped"));
        Self { shell, input, output: BufReader::new(output) }
    }

    /// Runs a bash script to its end, in the source tree.
    #[track_caller]
    pub fn sh(&mut self, script: &str) -> Told {
        let input = self.input.as_mut().expect("open until the machine is dropped");
        input.write_all(format!("{HEAD}{script}\0").as_bytes()).expect("the machine apart takes a script");
        let mut part = || {
            let mut bytes = Vec::new();
            let _length = self.output.read_until(0, &mut bytes).expect("a pipe can be read");
            assert_eq!(bytes.pop(), Some(0), "the machine apart ended; need: root, unshare, overlay");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (text, code) = (part(), part());
        Told { script: script.to_owned(), code: code.parse().expect("a status is a number"), text }
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        drop(self.input.take());
        let status = self.shell.wait().expect("wait for our own child");
        assert!(status.success() || std::thread::panicking(), "apart.sh left something behind: {status}");
    }
}
