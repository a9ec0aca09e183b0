//! Every verb of `docker` on a container by its effect inside and outside, with plain runc beside it as the judge.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::process::Stdio;

use serde_json::Value;
use sysbox_tests::engine::{
    BUSYBOX, Container, Said, api, docker, docker_command, record_of, remains_of, run, unique, until,
};
use sysbox_tests::host::{NO_NAMES, host_dir};

const BOTH: [&str; 2] = ["sysbox-runc", "runc"];

/// An image of ours, removed when this is dropped.
struct Image(String);

impl Drop for Image {
    fn drop(&mut self) {
        let removed = docker(["rmi", "-f", &self.0]);
        assert!(std::thread::panicking() || removed.code == 0, "{removed:?}");
    }
}

/// What an init says that tells of each signal it gets, and ends at TERM with 7.
const TELLS: &str = "trap 'echo term; exit 7' TERM; trap 'echo hup' HUP; trap 'echo usr' USR1; echo ready; while :; do sleep 0.05; done";

fn telling(runtime: &str, options: &[&str]) -> Container {
    // The last one wins over `Container`'s own.
    let all = [&["--runtime", runtime, "--stop-signal", "TERM"], options].concat();
    let container = Container::start(&all, BUSYBOX, &["sh", "-c", TELLS]);
    logged(&container, "ready\n");
    container
}

fn logs(container: &Container) -> String {
    container.docker(&["logs"]).ok() + "\n"
}

#[track_caller]
fn logged(container: &Container, text: &str) {
    until(&format!("{text:?} in the log"), || logs(container).ends_with(text).then_some(()));
}

#[test]
fn stop_kill_wait_start_restart() {
    for runtime in BOTH {
        let container = telling(runtime, &[]);
        for (signal, said) in [("HUP", "ready\nhup\n"), ("USR1", "ready\nhup\nusr\n")] {
            docker(["kill", "-s", signal, &container.name]).ok();
            logged(&container, said);
        }
        // The signal of the image's own choice, and the program's own exit code.
        docker(["stop", "-t", "60", &container.name]).ok();
        assert_eq!(container.inspect("{{.State.Status}} {{.State.ExitCode}}"), "exited 7", "{runtime}");
        assert!(container.docker(&["kill"]).refused().contains("is not running"));
        container.docker(&["start"]).ok();
        logged(&container, "term\nready\n");
        // One that does not listen is killed when its time is over.
        container.sh("kill -STOP 1 2>/dev/null; :");
        docker(["kill", "-s", "STOP", &container.name]).ok();
        docker(["restart", "-t", "1", &container.name]).ok();
        logged(&container, "ready\nready\n");
        let waiting = docker_command(["wait", &container.name]).stdout(Stdio::piped()).spawn().unwrap();
        docker(["kill", &container.name]).ok();
        let waited = waiting.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&waited.stdout), "137\n", "{runtime}");
    }
}

#[test]
fn rm_wants_force_for_one_that_runs_and_leaves_nothing() {
    let container = Container::waiting(BUSYBOX, &[]);
    let (id, upper) = (container.id(), container.upper());
    assert!(container.docker(&["rm"]).refused().contains("running"));
    docker(["rm", "-f", &container.name]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), NO_NAMES);
    // `--rm` does so by itself.
    let (container, args) =
        Container::prepare(&["run", "--rm", "-d"], &[], BUSYBOX, &["sleep", "2147483647"]);
    docker(args).ok();
    let (id, upper) = (container.id(), container.upper());
    container.docker(&["kill"]).ok();
    until("it to be gone", || (docker(["inspect", &container.name]).code != 0).then_some(()));
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), NO_NAMES);
}

#[test]
fn exec_has_flags_of_its_own() {
    let runs =
        |runtime| Container::waiting(BUSYBOX, &["--runtime", runtime, "-e", "A=1", "-w", "/etc", "-u", "5"]);
    let both = BOTH.map(runs);
    for (options, script, expected) in [
        (&[][..], "pwd; id -u; echo $A$B", "/etc\n5\n1"),
        (&["-w", "/bin", "-u", "0", "-e", "B=2"], "pwd; id -u; echo $A$B", "/bin\n0\n12"),
        (&["-u", "7:8"], "id -u; id -g; id -G", "7\n8\n8"),
        (&["-u", "root"], "id -un", "root"),
    ] {
        for container in &both {
            assert_eq!(container.exec(options, &["sh", "-c", script]).ok(), expected, "{options:?}");
        }
    }
    for container in &both {
        container.exec(&["-d", "-u", "0"], &["sh", "-c", "sleep 0.2; echo done >/done"]).ok();
        until("the detached one to be done", || {
            (container.try_sh("cat /done").out == "done\n").then_some(())
        });
    }
    let [ours, plain] = both.each_ref().map(|container| container.exec(&["-u", "nobody-here"], &["true"]));
    assert_eq!((ours.code, ours.err), (plain.code, plain.err));
    let codes =
        |script: &str| both.each_ref().map(|container| container.exec(&[], &["sh", "-c", script]).code);
    assert_eq!(codes("exit 9"), [9, 9]);
    assert_eq!(codes("kill -9 $$"), [137, 137]);
}

#[test]
fn exec_privileged_is_an_exec_like_any_other() {
    let container = Container::waiting(BUSYBOX, &["-u", "5"]);
    let status = "grep CapBnd /proc/self/status; cat /proc/self/uid_map";
    assert_eq!(
        container.exec(&["--privileged", "-u", "0"], &["sh", "-c", status]).ok(),
        container.exec(&["-u", "0"], &["sh", "-c", status]).ok()
    );
}

#[test]
fn logs_keep_the_streams_apart_and_follow() {
    for runtime in BOTH {
        let script = "echo one; echo two >&2; echo three";
        let container = Container::start(&["--runtime", runtime], BUSYBOX, &["sh", "-c", script]);
        docker(["wait", &container.name]).ok();
        let Said { out, err, .. } = docker(["logs", &container.name]);
        assert_eq!((out.as_str(), err.as_str()), ("one\nthree\n", "two\n"), "{runtime}");
        // The order of the two streams is nobody's promise.
        let last = docker(["logs", "--tail", "1", &container.name]);
        assert_eq!((last.out + &last.err).lines().count(), 1, "{runtime}");
        let container = telling(runtime, &[]);
        let following =
            docker_command(["logs", "-f", &container.name]).stdout(Stdio::piped()).spawn().unwrap();
        docker(["stop", "-t", "60", &container.name]).ok();
        let all = following.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&all.stdout), "ready\nterm\n", "{runtime}");
    }
}

#[test]
fn attach_and_run_in_the_foreground_pass_signals_and_input_on() {
    for runtime in BOTH {
        let ticks = "trap 'exit 7' TERM; while :; do echo tick; sleep 0.05; done";
        let options = ["--runtime", runtime, "--stop-signal", "TERM"];
        let container = Container::start(&options, BUSYBOX, &["sh", "-c", ticks]);
        let mut attached =
            docker_command(["attach", &container.name]).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = attached.stdout.take().unwrap();
        let mut seen = [0; 5];
        std::io::Read::read_exact(&mut stdout, &mut seen).unwrap();
        assert_eq!(&seen, b"tick\n");
        let client = nix::unistd::Pid::from_raw(i32::try_from(attached.id()).unwrap());
        nix::sys::signal::kill(client, nix::sys::signal::Signal::SIGTERM).unwrap();
        // Else it waits for a reader.
        std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
        assert_eq!(attached.wait().unwrap().code(), Some(7), "{runtime}");
        assert_eq!(container.inspect("{{.State.ExitCode}}"), "7", "{runtime}");
        // Input until its end.
        let (_container, args) = Container::prepare(
            &["run", "-i"],
            &["--runtime", runtime],
            BUSYBOX,
            &["sh", "-c", "cat; exit 4"],
        );
        let mut child = docker_command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"through\n").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (String::from_utf8_lossy(&output.stdout).as_ref(), output.status.code()),
            ("through\n", Some(4))
        );
    }
}

#[test]
fn cp_goes_both_ways_while_it_runs() {
    for runtime in BOTH {
        let dir = host_dir();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(path("tree")).unwrap();
        fs::write(path("tree/file"), "of the host").unwrap();
        std::os::unix::fs::symlink("file", path("tree/link")).unwrap();
        let container = Container::waiting(BUSYBOX, &["--runtime", runtime]);
        let inside = |name: &str| format!("{}:{name}", container.name);
        docker(["cp", &path("tree"), &inside("/root/")]).ok();
        let look = "cd /root/tree && cat file && readlink link && stat -c %u:%g file link";
        until("the copy to be seen", || {
            (container.try_sh(look).out == "of the hostfile\n0:0\n0:0\n").then_some(())
        });
        container.sh("echo mine >/root/out; chown 7:8 /root/out; chmod 640 /root/out");
        until("what was made inside to be seen", || {
            let copied = docker(["cp", &inside("/root/out"), &path("out")]);
            (copied.code == 0 && fs::read_to_string(path("out")).ok()? == "mine\n").then_some(())
        });
        // As a stream it has the owners of inside.
        let mut command = docker_command(["cp", &inside("/root/out"), "-"]);
        let stream = command.stdout(Stdio::piped()).spawn().unwrap().stdout.unwrap();
        let mut tar = std::process::Command::new("tar");
        let listed = tar.args(["--numeric-owner", "-tv"]).stdin(stream).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.starts_with("-rw-r----- 7/8 ") && listed.ends_with(" out\n"), "{runtime} {listed}");
        let error = docker(["cp", &inside("/nowhere"), &path("x")]).refused();
        assert!(error.contains("nowhere"), "{error}");
    }
}

#[test]
fn diff_commit_and_export_show_what_was_changed() {
    let seen = BOTH.map(|runtime| {
        let container = Container::waiting(BUSYBOX, &["--runtime", runtime]);
        container.sh(
            "echo new >/new; chown 7:8 /new; rm /etc/group; echo more >>/etc/passwd; mkdir -m 1700 /root/dir",
        );
        let diff = until("the engine to see all of it", || {
            let lines = docker(["diff", &container.name]).ok();
            // The places for inner engines are added where the image has none (docs/DIFFERENCES.md).
            let ours = ["/var", "/run", "/dev", "/sys", "/proc"];
            let mut lines: Vec<String> = lines
                .lines()
                .filter(|line| !ours.iter().any(|dir| line[2..].starts_with(dir)))
                .map(str::to_owned)
                .collect();
            lines.sort();
            lines.iter().any(|line| line == "A /root/dir").then_some(lines)
        });
        let image = Image(unique("image"));
        docker(["commit", "-c", "CMD [\"cat\", \"/new\"]", &container.name, &image.0]).ok();
        let kept = "cat /new; stat -c '%u:%g %a' /new /root/dir; ls /etc; tail -1 /etc/passwd";
        let kept = Container::run(&["--runtime", runtime], &image.0, &["sh", "-c", kept]).ok();
        assert_eq!(Container::run(&["--runtime", runtime], &image.0, &[]).ok(), "new");
        let dir = host_dir();
        let tar = dir.path().join("tar").display().to_string();
        docker(["export", "-o", &tar, &container.name]).ok();
        let list = run(std::process::Command::new("tar").args(["--numeric-owner", "-tvf", &tar])).ok();
        let told = |name: &str| -> Vec<String> {
            let lines = list.lines().filter(|line| line.ends_with(name));
            lines.map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect()
        };
        let exported = [told(" new"), told(" etc/passwd"), told(" etc/group"), told(" root/dir/")];
        (diff, kept, exported)
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].0, ["A /new", "A /root/dir", "C /etc", "C /etc/passwd", "C /root", "D /etc/group"]);
    assert_eq!(seen[0].2[0], ["-rw-r--r-- 7/8"]);
}

#[test]
fn stats_are_the_containers_own() {
    for runtime in BOTH {
        let options = ["--runtime", runtime, "--memory", "64m", "--pids-limit", "50"];
        let script = "dd if=/dev/zero of=/dev/shm/20m bs=1M count=20 2>/dev/null; sleep 4711 & sleep 4712 & while :; do :; done";
        let container = Container::start(&options, BUSYBOX, &["sh", "-c", script]);
        let stats =
            || api("GET", &format!("/containers/{}/stats?stream=false", container.name), &Value::Null);
        let stats = until("the program to have eaten", || {
            let stats = stats();
            let used = stats["memory_stats"]["usage"].as_u64()?;
            let busy = stats["cpu_stats"]["cpu_usage"]["total_usage"].as_u64()?;
            (used > 20 << 20 && busy > 100_000_000 && stats["pids_stats"]["current"] == 3).then_some(stats)
        });
        assert_eq!(stats["memory_stats"]["limit"], 64 << 20, "{runtime} {stats:#}");
        assert!(stats["memory_stats"]["usage"].as_u64().unwrap() <= 64 << 20, "{runtime} {stats:#}");
        assert_eq!(stats["pids_stats"]["limit"], 50, "{runtime} {stats:#}");
        assert!(stats["networks"]["eth0"]["rx_bytes"].is_u64(), "{runtime} {stats:#}");
        let shown =
            docker(["stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", &container.name]).ok();
        assert!(shown.ends_with(" / 64MiB|3"), "{runtime} {shown}");
    }
}

#[test]
fn figures_follow_an_update_and_count_what_is_made_below() {
    let container = Container::waiting(BUSYBOX, &["--memory", "64m", "--memory-swap", "64m"]);
    docker(["update", "--memory", "128m", "--memory-swap", "128m", "--pids-limit", "77", &container.name])
        .ok();
    container.sh("cd /sys/fs/cgroup; for g in memory pids; do [ ! -d $g ] || mkdir $g/below; done; [ -d memory ] || mkdir below
        for g in memory/below pids/below below; do [ ! -d $g ] || echo $$ >$g/cgroup.procs || exit 1; done
        sleep 4711 & dd if=/dev/zero of=/dev/shm/20m bs=1M count=20");
    let shown = docker(["stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", &container.name]).ok();
    let (used, rest) = shown.split_once("MiB").unwrap_or_else(|| panic!("{shown}"));
    assert!(used.parse::<f64>().unwrap() > 20.0, "{shown}");
    assert_eq!(rest, " / 128MiB|2", "{shown}");
}

#[test]
fn top_pause_unpause_rename_and_inspect() {
    for runtime in BOTH {
        let container =
            Container::start(&["--runtime", runtime], BUSYBOX, &["sh", "-c", "sleep 4711 & exec sleep 4712"]);
        let listed = until("both to run", || {
            let listed = docker(["top", &container.name, "-o", "pid,args"]).ok();
            (listed.contains("sleep 4711") && listed.contains("sleep 4712")).then_some(listed)
        });
        assert!(listed.contains(&container.host_pid().to_string()), "{listed}");
        docker(["pause", &container.name]).ok();
        assert_eq!(
            container.inspect("{{.State.Status}} {{.State.Paused}} {{.State.Running}}"),
            "paused true true"
        );
        assert!(docker(["pause", &container.name]).refused().contains("already paused"));
        docker(["unpause", &container.name]).ok();
        assert_eq!(container.inspect("{{.State.Status}}"), "running");
        let container = {
            let name = unique("renamed");
            docker(["rename", &container.name, &name]).ok();
            // The old name is nobody's now, and its removal no error.
            drop(container);
            Container { name }
        };
        assert_eq!(container.inspect("{{.Name}}"), format!("/{}", container.name));
        assert_eq!(container.inspect("{{.HostConfig.Runtime}}"), runtime);
        assert_eq!(container.exec(&[], &["echo", "there"]).ok(), "there");
        docker(["restart", "-t", "0", &container.name]).ok();
        assert_eq!(container.inspect("{{.State.Running}}"), "true");
    }
}

#[test]
fn restart_policies_and_healthchecks() {
    for runtime in BOTH {
        let container = Container::start(
            &["--runtime", runtime, "--restart", "on-failure:2"],
            BUSYBOX,
            &["sh", "-c", "echo run; exit 3"],
        );
        let over =
            || container.inspect("{{.State.Status}} {{.RestartCount}} {{.State.ExitCode}}") == "exited 2 3";
        until("two restarts", || over().then_some(()));
        assert_eq!(logs(&container), "run\nrun\nrun\n", "{runtime}");

        let container = Container::start(
            &["--runtime", runtime, "--restart", "always"],
            BUSYBOX,
            &["sleep", "2147483647"],
        );
        let first = container.host_pid();
        // By nobody's order: as the kernel does when memory runs out.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(first), nix::sys::signal::Signal::SIGKILL).unwrap();
        until("it to be back", || {
            let state = container.inspect("{{.State.Status}} {{.RestartCount}} {{.State.Pid}}");
            (state.starts_with("running 1 ") && !state.ends_with(&format!(" {first}"))).then_some(())
        });
        assert_eq!(container.exec(&[], &["echo", "back"]).ok(), "back");

        let health = ["--health-cmd", "test -e /well", "--health-interval", "100ms", "--health-retries", "2"];
        let container = Container::waiting(BUSYBOX, &[&["--runtime", runtime], &health[..]].concat());
        let is = |state: &str| (container.inspect("{{.State.Health.Status}}") == state).then_some(());
        until("it to be unhealthy", || is("unhealthy"));
        container.sh("touch /well");
        until("it to be healthy", || is("healthy"));
    }
}
