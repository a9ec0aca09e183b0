//! Hooks that run after the create: startContainer (in the container, by init), poststart and poststop. Those of a create
//! are libcontainer's to run, prestart and createRuntime by way of this program, which takes them to their directory.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use oci_spec::runtime::{Hook, Hooks};
use serde_json::{Value, json};
use sysbox_sys::process::unblock_signals;

/// Of what a hook says, in an error.
const MAX_WORDS: usize = 4096;

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("error running {time} hook #{number}: {why}")]
    Failed { time: &'static str, number: usize, why: String },
}

/// The state as the specification wants it on a hook's standard input.
pub fn state(
    oci_version: &str,
    id: &str,
    status: &str,
    pid: Option<i32>,
    bundle: &Path,
    annotations: &HashMap<String, String>,
) -> Value {
    let mut document = json!({"ociVersion": oci_version, "id": id, "status": status});
    if let Some(pid) = pid {
        document["pid"] = pid.into();
    }
    document["bundle"] = json!(bundle);
    if !annotations.is_empty() {
        document["annotations"] = json!(annotations);
    }
    document
}

/// Runs one after the other. `env` is that of hooks that have none; without it they have ours.
///
/// # Errors
/// The first that failed; those after it are not run.
pub fn run(time: &'static str, hooks: &[Hook], state: &Value, env: Option<&[String]>) -> Result<(), Fault> {
    for (number, hook) in hooks.iter().enumerate() {
        run_one(hook, &state.to_string(), env).map_err(|why| Fault::Failed { time, number, why })?;
    }
    Ok(())
}

/// Makes of the hooks of a create what libcontainer runs as runc would: those that have no environment get this process's,
/// without what is no UTF-8, which a hook's environment cannot be (docs/DIFFERENCES.md); a time below zero is none, where
/// libcontainer would take it for all the time there is.
pub fn fit(hooks: &mut Hooks) {
    let own: Vec<String> = std::env::vars_os()
        .filter_map(|(name, value)| Some(format!("{}={}", name.to_str()?, value.to_str()?)))
        .collect();
    let fitted = |hooks: &Option<Vec<Hook>>| {
        let mut hooks = hooks.clone();
        for hook in hooks.iter_mut().flatten() {
            let env = hook.env().clone().unwrap_or_else(|| own.clone());
            let timeout = hook.timeout().map(|seconds| seconds.max(0));
            hook.set_env(Some(env)).set_timeout(timeout);
        }
        hooks
    };
    #[allow(deprecated)] // the specification's, and engines still give it
    let prestart = fitted(hooks.prestart());
    let (runtime, container) = (fitted(hooks.create_runtime()), fitted(hooks.create_container()));
    #[allow(deprecated)] // as above
    hooks.set_prestart(prestart);
    hooks.set_create_runtime(runtime).set_create_container(container);
}

/// The name by which this program is called to take a hook to its directory.
pub const IN_DIRECTORY: &str = "sysbox-runc-hook";

/// Has the hooks that run outside of the container run in `dir`, though the process that runs them is elsewhere
/// (`launch.rs` says why): each by way of [`in_directory`], which costs an exec.
pub fn run_in(hooks: &mut Hooks, dir: &str) {
    let moved = |hooks: &Option<Vec<Hook>>| {
        let mut hooks = hooks.clone();
        for hook in hooks.iter_mut().flatten() {
            let path = hook.path().display().to_string();
            let own =
                hook.args().clone().filter(|args| !args.is_empty()).unwrap_or_else(|| vec![path.clone()]);
            let mut args = vec![IN_DIRECTORY.to_owned(), dir.to_owned(), path];
            args.extend(own);
            hook.set_path("/proc/self/exe".into()).set_args(Some(args));
        }
        hooks
    };
    #[allow(deprecated)] // the specification's, and engines still give it
    let prestart = moved(hooks.prestart());
    let runtime = moved(hooks.create_runtime());
    #[allow(deprecated)] // as above
    hooks.set_prestart(prestart);
    hooks.set_create_runtime(runtime);
}

/// Becomes the hook: `args` are the directory, the program, and its arguments from the name on. Returns if it cannot.
pub fn in_directory(mut args: impl Iterator<Item = OsString>) -> String {
    let (Some(dir), Some(path), Some(name)) = (args.next(), args.next(), args.next()) else {
        return format!("{IN_DIRECTORY}: directory, program and name");
    };
    let mut command = Command::new(&path);
    command.arg0(name).args(args).current_dir(dir);
    unblock_signals(&mut command);
    let why = command.exec();
    format!("fork/exec {}: {}", Path::new(&path).display(), crate::bundle::reason(&why))
}

fn run_one(hook: &Hook, state: &str, env: Option<&[String]>) -> Result<(), String> {
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(args);
    }
    if let Some(pairs) = hook.env().as_deref().or(env) {
        command.env_clear().envs(pairs.iter().filter_map(|pair| pair.split_once('=')));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A `run` in the foreground has blocked them for itself.
    unblock_signals(&mut command);
    let started = command.spawn();
    let mut child = started
        .map_err(|error| format!("fork/exec {}: {}", hook.path().display(), crate::bundle::reason(&error)))?;
    // As runc has it, one of zero or less is over at once. One that no clock reaches is none.
    let seconds = hook.timeout();
    let within = |seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let deadline = seconds.and_then(|seconds| Instant::now().checked_add(within(seconds)));
    match attend(&mut child, state.as_bytes(), deadline) {
        Ok(Some((status, _))) if status.success() => Ok(()),
        Ok(Some((status, [out, err]))) => {
            let status = status.to_string().replace("exit status: ", "exit status ");
            Err(format!("{status}, stdout: {out}, stderr: {err}"))
        }
        Ok(None) => {
            // It was our own child a moment ago, and nobody else reaps it.
            let _ended = child.kill().and_then(|()| child.wait());
            Err(format!("hook ran past specified timeout of {:.1}s", seconds.unwrap_or_default() as f64))
        }
        Err(why) => Err(why),
    }
}

/// Gives the hook its state and waits for its end, and for that of who holds its streams; `None` if it is not there in time.
fn attend(
    child: &mut Child,
    state: &[u8],
    deadline: Option<Instant>,
) -> Result<Option<(ExitStatus, [String; 2])>, String> {
    let said = |error: std::io::Error| error.to_string();
    let mut input = child.stdin.take().map(OwnedFd::from).map(std::fs::File::from);
    let outputs = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
    let mut outputs = outputs.map(|fd| fd.map(std::fs::File::from));
    for file in input.iter().chain(outputs.iter().flatten()) {
        fcntl(file.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| errno.desc().to_owned())?;
    }
    let (mut written, mut words) = (0, [Vec::new(), Vec::new()]);
    while outputs.iter().any(Option::is_some) {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(None);
        }
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut wanted: Vec<PollFd<'_>> =
            outputs.iter().flatten().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)).collect();
        wanted.extend(input.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLOUT)));
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.desc().to_owned()),
        }
        drop(wanted);
        if let Some(file) = &mut input {
            match file.write(&state[written..]) {
                Ok(length) => written += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                // It does not want to know.
                Err(_) => written = state.len(),
            }
            if written == state.len() {
                input = None;
            }
        }
        for (output, words) in outputs.iter_mut().zip(&mut words) {
            let Some(file) = output else { continue };
            let mut chunk = [0; 4096];
            match file.read(&mut chunk) {
                Ok(0) => *output = None,
                Ok(length) => {
                    words.extend_from_slice(&chunk[..length.min(MAX_WORDS.saturating_sub(words.len()))])
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(said(error)),
            }
        }
    }
    loop {
        if let Some(status) = child.try_wait().map_err(said)? {
            return Ok(Some((status, words.map(|words| String::from_utf8_lossy(&words).into_owned()))));
        }
        if deadline.is_some_and(|deadline| Instant::now() > deadline) {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::HookBuilder;

    fn ran(script: &str, timeout: Option<i64>) -> Result<(), String> {
        let args = ["sh", "-c", script].map(str::to_owned).to_vec();
        let hook = HookBuilder::default().path("/bin/sh").args(args).env(["A=1".to_owned()].to_vec());
        let hook = match timeout {
            Some(seconds) => hook.timeout(seconds).build().unwrap(),
            None => hook.build().unwrap(),
        };
        run("poststop", &[hook], &json!({"id": "c"}), None).map_err(|fault| fault.to_string())
    }

    #[test]
    fn a_hook_gets_the_state_and_its_environment_and_is_waited_for() {
        assert_eq!(
            ran("test \"$(cat)\" = '{\"id\":\"c\"}' && test $A = 1 && test -z \"$HOME\"", None),
            Ok(())
        );
        assert_eq!(ran("exec >&- 2>&-; :", None), Ok(()));
        assert_eq!(ran("exec <&-; :", Some(60)), Ok(()));
        assert_eq!(ran(":", Some(i64::MAX)), Ok(()));
    }

    #[test]
    fn a_hook_that_fails_is_told_as_by_runc() {
        for (script, timeout, why) in [
            ("echo a; echo b >&2; exit 3", None, "exit status 3, stdout: a\n, stderr: b\n"),
            ("sleep 1000", Some(1), "hook ran past specified timeout of 1.0s"),
            ("exec sleep 1000 >&- 2>&-", Some(1), "hook ran past specified timeout of 1.0s"),
            (":", Some(0), "hook ran past specified timeout of 0.0s"),
            (":", Some(-5), "hook ran past specified timeout of -5.0s"),
        ] {
            assert_eq!(ran(script, timeout), Err(format!("error running poststop hook #0: {why}")));
        }
        let none = HookBuilder::default().path("/no/such").build().unwrap();
        let said = run("poststart", &[none], &json!({}), None).unwrap_err().to_string();
        assert_eq!(said, "error running poststart hook #0: fork/exec /no/such: no such file or directory");
    }
}
