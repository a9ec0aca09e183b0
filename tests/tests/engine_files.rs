//! `docker cp`, `diff`, `commit` and `export` of a container that runs and writes: what the engine shows is what the container
//! has, what it copies in is what the container gets, and nothing that the container does fails for it.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use sysbox_tests::engine::{BUSYBOX, Container, DEBIAN, Said, Volume, docker, docker_command, unique};

/// What is promised for the time until the container sees what the engine did; and how much more a machine that is busy with
/// other tests may take. (What the engine sees of the container is right at once.)
const PROMISED: Duration = Duration::from_millis(100);
const BUSY: u32 = 20;

/// Goes into each directory that it reads the name of, makes and removes files there until the engine's is there and for some
/// time longer, and says how many of its attempts failed, how many of the last, and how often it had to leave and come anew.
const WRITER: &str = r#"
while read -r dir; do
    made=0 failed=0 after=0 last=0 left=0 pause=0
    cd "/$dir" || exit
    while [ $after -lt 50 ]; do
        if { : >own && [ -e own ] && rm own; } 2>/dev/null; then
            made=$((made + 1)) pause=0
        else
            failed=$((failed + 1)) pause=$((pause + 1))
            [ $after -lt 25 ] || last=$((last + 1))
            if [ $pause -gt 20000 ]; then
                left=$((left + 1)) pause=0
                cd /
                until { : >"/$dir/own"; } 2>/dev/null; do sleep 0.1; done
                cd "/$dir" || exit
            fi
        fi
        [ -e sent ] && after=$((after + 1))
    done
    cd /
    echo "$made $failed $last $left"
done"#;

/// What a race came to.
#[derive(Debug, Default)]
struct Met {
    made: u64,
    /// Where a write of the container's failed, and how often.
    inside: Vec<String>,
    /// Of those, writes that failed long after the engine's file was there.
    late: u64,
    outside: Vec<String>,
    /// Directories in which nothing could be made until nobody had them in use.
    left: u64,
    /// Rounds that do not count: on a busy disk it can take longer to make a container ready than its engine is held.
    too_early: usize,
}

/// How often an engine was let go too early, by the manager's log.
fn let_go_too_early(id: &str) -> usize {
    let log = Path::new(&std::env::var_os("SYSBOX_LOGS").unwrap()).join("sysbox-mgr.log");
    let log = fs::read_to_string(log).unwrap();
    log.lines().filter(|line| line.contains("was let go before") && line.contains(id)).count()
}

/// A process comes into a directory of the image at any moment around the engine's first write to it, and writes there.
/// `copy` says what is copied where, so that `sent` comes to be in that directory.
fn race(rounds: usize, below: &str, copy: impl Fn(&Path, &str) -> (PathBuf, String)) -> Met {
    let container = Container::waiting(DEBIAN, &[]);
    let listed = container
        .sh(&format!("find {below} -xdev -type d -links 2 | sort -R | grep -v docker | head -n {rounds}"));
    let dir = tempfile::tempdir().unwrap();
    let mut inside = docker_command(["exec", "-i", &container.name, "bash", "-c", WRITER])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut orders, mut said) =
        (inside.stdin.take().unwrap(), BufReader::new(inside.stdout.take().unwrap()).lines());
    let (mut met, id) = (Met::default(), container.id());
    let mut too_early = let_go_too_early(&id);
    for (round, name) in listed.lines().map(|name| name.trim_start_matches('/')).enumerate() {
        let (from, to) = copy(dir.path(), name);
        let args = ["cp", from.to_str().unwrap(), &format!("{}:{to}", container.name)].map(str::to_owned);
        // From well before the copy begins to well after it was made.
        let delay = Duration::from_millis(round as u64 * 7 % 120);
        let is_first = round % 4 == 0;
        if is_first {
            writeln!(orders, "{name}").unwrap();
        }
        let mut copying = docker_command(&args).stderr(Stdio::null()).spawn().unwrap();
        if !is_first {
            std::thread::sleep(delay);
            writeln!(orders, "{name}").unwrap();
        }
        let is_copied = copying.wait().unwrap().success();
        if !is_copied {
            docker(&args).ok();
        }
        let line = said.next().unwrap().unwrap();
        let counts: Vec<u64> = line.split(' ').map(|count| count.parse().unwrap()).collect();
        met.made += counts[0];
        met.late += counts[2];
        met.left += counts[3];
        let before = std::mem::replace(&mut too_early, let_go_too_early(&id));
        if before != too_early {
            met.too_early += 1;
            continue;
        }
        if !is_copied {
            met.outside.push(name.to_owned());
        }
        if counts[1] != 0 {
            met.inside.push(format!("{name} after {delay:?}: {}", counts[1]));
        }
    }
    drop(orders);
    inside.wait().unwrap();
    println!("{} directories of the image: {met:?}", listed.lines().count());
    met
}

/// How many rounds of a race: few, where nobody asks for more.
fn rounds() -> usize {
    std::env::var("ROUNDS").map_or(40, |rounds| rounds.parse().unwrap())
}

#[test]
fn a_write_in_a_fresh_directory_of_the_image_never_fails_for_a_copy() {
    let met = race(rounds(), "/usr/share /usr/lib /var /opt /srv", |dir, name| {
        let from = dir.join("in");
        fs::write(&from, "of the engine").unwrap();
        (from, format!("/{name}/sent"))
    });
    assert_eq!((met.inside, met.outside, met.left), (vec![], vec![], 0));
    assert!(met.too_early < rounds() / 2, "{} rounds do not count", met.too_early);
}

/// The engine does not look at what is below the target before it writes there.
#[test]
fn a_tree_over_fresh_directories_of_the_image_disturbs_until_they_are_left_at_most() {
    let met = race(rounds(), "/usr/share", |dir, name| {
        let tree = dir.join(name.replace('/', "-"));
        let place = tree.join(name.strip_prefix("usr/share/").unwrap());
        fs::create_dir_all(&place).unwrap();
        fs::write(place.join("sent"), "of the engine").unwrap();
        (tree.join("."), "/usr/share".to_owned())
    });
    assert_eq!(met.late, 0);
    assert!(met.left < met.made / 100, "{met:?}");
}

/// A shell that stays in a container, and answers at once.
struct Shell {
    child: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Shell {
    fn of(container: &Container, directory: &str) -> Self {
        let args = ["exec", "-i", "-w", directory, &container.name, "sh"];
        let mut child = docker_command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut shell = Self { child, orders, answers: BufReader::new(answers).lines() };
        shell.try_say("exec 2>&1").unwrap();
        shell
    }

    /// What a script says, or what it says when it fails.
    fn try_say(&mut self, script: &str) -> Result<String, String> {
        writeln!(self.orders, "{script}\necho \"\n:end:$?\"").unwrap();
        let mut said = String::new();
        loop {
            let line = self.answers.next().unwrap().unwrap();
            if let Some(code) = line.strip_prefix(":end:") {
                let said = said.trim_end().to_owned();
                return if code == "0" { Ok(said) } else { Err(said) };
            }
            said += &line;
            said.push('\n');
        }
    }

    #[track_caller]
    fn say(&mut self, script: &str) -> String {
        self.try_say(script).unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// How long it takes until a script says what it should.
    #[track_caller]
    fn until(&mut self, script: &str, expected: &str) -> Duration {
        let begin = Instant::now();
        loop {
            let said = self.try_say(script);
            if said.as_deref() == Ok(expected) {
                return begin.elapsed();
            }
            assert!(begin.elapsed() < PROMISED * BUSY, "{script}: {said:?}, not {expected:?}");
        }
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// The two sides of a container's files, and what has been measured.
struct Sides {
    container: Container,
    dir: tempfile::TempDir,
    longest: Duration,
}

impl Sides {
    fn new(options: &[&str]) -> Self {
        let container = Container::waiting(DEBIAN, options);
        Self { container, dir: tempfile::tempdir().unwrap(), longest: Duration::ZERO }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn there(&self, path: &str) -> String {
        format!("{}:{path}", self.container.name)
    }

    #[track_caller]
    fn copy_in(&self, content: &str, to: &str) {
        let from = self.path("in");
        fs::write(&from, content).unwrap();
        docker(["cp", from.to_str().unwrap(), &self.there(to)]).ok();
    }

    fn copy_out(&self, from: &str) -> Result<String, String> {
        let to = self.path("out");
        let Said { code, err, .. } = docker(["cp", &self.there(from), to.to_str().unwrap()]);
        if code == 0 { Ok(fs::read_to_string(&to).unwrap()) } else { Err(err) }
    }

    /// The names in a directory, as an archive of it has them.
    #[track_caller]
    fn listed_outside(&self, directory: &str) -> Vec<String> {
        let to = self.path("listed");
        docker(["cp", &self.there(directory), to.to_str().unwrap()]).ok();
        let mut names: Vec<String> = fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        fs::remove_dir_all(to).unwrap();
        names
    }

    #[track_caller]
    fn seen(&mut self, shell: &mut Shell, script: &str, expected: &str) {
        self.longest = self.longest.max(shell.until(script, expected));
    }
}

/// Everything that either side can do in one directory, after both have looked before.
#[track_caller]
fn both_ways(sides: &mut Sides, shell: &mut Shell, place: &str) {
    let path = |name: &str| format!("{place}/{name}");
    let (sent, made, moved) = (path("sent"), path("made"), path("moved"));
    // Looked for in vain, and listed, by both.
    shell.try_say(&format!("cat {sent}")).unwrap_err();
    shell.say(&format!("ls {place}"));
    sides.copy_out(&made).unwrap_err();
    sides.listed_outside(place);

    sides.copy_in("first", &sent);
    shell.say(&format!(": >{made}"));
    sides.seen(shell, &format!("cat {sent}"), "first");
    sides.seen(shell, &format!("ls {place} | grep -x sent"), "sent");
    shell.say(&format!("echo one >{made}"));
    assert_eq!(sides.copy_out(&made).as_deref(), Ok("one\n"), "{made}");
    shell.say(&format!("echo two >{made}; echo more >>{sent}"));
    assert_eq!(sides.copy_out(&made).as_deref(), Ok("two\n"), "{made}: old content");
    assert_eq!(sides.copy_out(&sent).as_deref(), Ok("firstmore\n"), "{sent}");
    sides.copy_in("second", &sent);
    sides.seen(shell, &format!("cat {sent}"), "second");

    shell.say(&format!("mv {made} {moved}"));
    sides.copy_out(&made).unwrap_err();
    assert_eq!(sides.copy_out(&moved).as_deref(), Ok("two\n"), "{moved}: renamed");
    let listed = shell.say(&format!("ls -A {place}"));
    assert_eq!(sides.listed_outside(place), listed.lines().collect::<Vec<_>>(), "{place}");

    shell.say(&format!("rm {moved} {sent} && mkdir {sent} && echo deep >{sent}/deep"));
    sides.copy_out(&moved).unwrap_err();
    assert_eq!(sides.copy_out(&path("sent/deep")).as_deref(), Ok("deep\n"), "{sent}: a directory now");
    shell.say(&format!("rm -r {sent} && ln -s made {sent} && echo linked >{made}"));
    let link = sides.path("link");
    docker(["cp", &sides.there(&sent), link.to_str().unwrap()]).ok();
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("made"), "{sent}: a link now");
    fs::remove_file(&link).unwrap();
    docker(["cp", "-L", &sides.there(&sent), link.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(&link).unwrap(), "linked\n", "{sent}: what it leads to");
    shell.say(&format!("rm {sent} {made}"));
    sides.copy_out(&sent).unwrap_err();
    fs::remove_file(&link).unwrap();
    symlink("to-nowhere", &link).unwrap();
    docker(["cp", link.to_str().unwrap(), &sides.there(&sent)]).ok();
    sides.seen(shell, &format!("readlink {sent}"), "to-nowhere");
    shell.say(&format!("rm {sent}"));
    fs::remove_file(&link).unwrap();
}

#[test]
fn either_side_sees_at_once_what_the_other_did_in_any_kind_of_directory() {
    let volume = Volume::new();
    let mount = format!("{}:/srv/deep/volume", volume.name);
    let mut sides = Sides::new(&["-v", &mount]);
    let mut shell = Shell::of(&sides.container, "/");
    // One that is a working directory, one beside a program that runs, one of the image that nobody uses, one with a mount in
    // it, a volume, and one that the container has made.
    let mut standing = Shell::of(&sides.container, "/usr/share/perl5");
    shell.say("cp /bin/sleep /usr/share/bug/ && (/usr/share/bug/sleep 2147483647 >/dev/null &)");
    shell.say("mkdir -p /root/own");
    for place in [
        "/usr/share/perl5",
        "/usr/share/bug",
        "/usr/share/pixmaps",
        "/srv/deep",
        "/srv/deep/volume",
        "/etc",
        "/root/own",
    ] {
        both_ways(&mut sides, &mut shell, place);
    }
    // By names from the working directory.
    standing.say(": >relative && rm relative");
    println!("at most {:?} until the container saw it", sides.longest);
}

#[test]
fn an_archive_and_owners_come_as_they_are() {
    let sides = Sides::new(&[]);
    let mut shell = Shell::of(&sides.container, "/");
    let tree = sides.path("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "of the archive").unwrap();
    std::os::unix::fs::chown(tree.join("sub/file"), Some(1234), Some(4321)).unwrap();
    let archive = sides.path("archive.tar");
    let [from, out] = [&tree, &archive].map(|path| path.to_str().unwrap());
    sysbox_tests::engine::run(std::process::Command::new("tar").args(["-C", from, "-cf", out, "."])).ok();
    let copied = docker_command(["cp", "-", &sides.there("/usr/share/misc")])
        .stdin(fs::File::open(&archive).unwrap())
        .status();
    assert!(copied.unwrap().success());
    shell.until("cat /usr/share/misc/sub/file", "of the archive");
    docker(["cp", "-a", from, &sides.there("/opt/tree")]).ok();
    shell.until("stat -c %u:%g /opt/tree/sub/file", "1234:4321");
    shell.say("chown 77:88 /opt/tree/sub/file && rm -r /usr/share/misc/sub");
    let back = sides.path("back.tar");
    let copied = docker_command(["cp", &sides.there("/opt/tree"), "-"])
        .stdout(fs::File::create(&back).unwrap())
        .status();
    assert!(copied.unwrap().success());
    let list = ["--numeric-owner", "-tvf", back.to_str().unwrap()];
    let listed = sysbox_tests::engine::run(std::process::Command::new("tar").args(list)).ok();
    let of_file = listed.lines().find(|line| line.ends_with("tree/sub/file")).unwrap();
    assert!(of_file.contains(" 77/88 "), "{of_file}");
    let stream = docker(["cp", &sides.there("/usr/share/misc/sub"), "-"]);
    assert_ne!(stream.code, 0, "deleted inside");
}

/// The whole of a container, after it has written, removed, renamed and replaced, and after each of them has looked before.
#[test]
fn diff_commit_and_export_show_what_the_container_has_at_that_moment() {
    let sides = Sides::new(&[]);
    let mut shell = Shell::of(&sides.container, "/");
    let export = || {
        let to = sides.path("all.tar");
        docker(["export", "-o", to.to_str().unwrap(), &sides.container.name]).ok();
        let list = ["-tf", to.to_str().unwrap()];
        sysbox_tests::engine::run(std::process::Command::new("tar").args(list)).ok()
    };
    let diff = || {
        let said = sides.container.docker(&["diff"]).ok();
        let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
        // The data roots: docs/DIFFERENCES.md.
        lines.retain(|line| !line.contains(" /var/lib"));
        lines.sort();
        lines
    };
    let before = diff();
    assert!(export().lines().any(|name| name == "usr/share/perl5/Debconf/"));
    sides.copy_in("of the engine", "/usr/share/pixmaps/sent");
    shell.until("cat /usr/share/pixmaps/sent", "of the engine");
    shell.say(
        "echo new >/usr/share/misc/new; rm /etc/issue; mv /etc/issue.net /etc/issue.moved;
         rm -r /usr/share/perl5/Debconf && echo file >/usr/share/perl5/Debconf;
         rm /etc/debian_version && mkdir /etc/debian_version && echo deep >/etc/debian_version/deep",
    );
    let mut expected = before;
    expected.extend(
        [
            "C /etc",
            "D /etc/issue",
            "D /etc/issue.net",
            "A /etc/issue.moved",
            "C /etc/debian_version",
            "A /etc/debian_version/deep",
            "C /usr",
            "C /usr/share",
            "C /usr/share/misc",
            "A /usr/share/misc/new",
            "C /usr/share/perl5",
            "C /usr/share/perl5/Debconf",
            "C /usr/share/pixmaps",
            "A /usr/share/pixmaps/sent",
        ]
        .map(str::to_owned),
    );
    expected.sort();
    expected.dedup();
    assert_eq!(diff(), expected);
    let names = export();
    let has = |name: &str| names.lines().any(|line| line == name);
    for there in
        ["usr/share/misc/new", "etc/issue.moved", "usr/share/perl5/Debconf", "etc/debian_version/deep"]
    {
        assert!(has(there), "{there} is exported");
    }
    for gone in ["etc/issue", "etc/issue.net", "usr/share/perl5/Debconf/"] {
        assert!(!has(gone), "{gone} is not exported");
    }
    // `--pause=false` leaves the container running while it is read.
    for pause in ["--pause=true", "--pause=false"] {
        let image = unique("image");
        shell.say(&format!("echo {pause} >/usr/share/misc/last"));
        docker(["commit", pause, &sides.container.name, &image]).ok();
        let said = Container::run(
            &["--rm"],
            &image,
            &[
                "sh",
                "-c",
                "cat /usr/share/misc/last /usr/share/perl5/Debconf /etc/debian_version/deep /usr/share/pixmaps/sent; ls /etc | grep issue",
            ],
        );
        docker(["rmi", &image]).ok();
        assert_eq!(said.ok(), format!("{pause}\nfile\ndeep\nof the engineissue.moved"));
    }
}

/// Another thing that Docker's users do: files into a container whose init has hardly started.
#[test]
fn a_copy_right_after_the_start_arrives() {
    for _ in 0..5 {
        let container = Container::waiting(BUSYBOX, &[]);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "early").unwrap();
        docker(["cp", file.path().to_str().unwrap(), &format!("{}:/root/early", container.name)]).ok();
        Shell::of(&container, "/root").until("cat early", "early");
    }
}
