//! Terminals and pidfds: who listens at a socket gets them, and what runs inside has a terminal that is its own, as with
//! runc. runc is the oracle; the same look is taken inside both.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::os::fd::AsRawFd;

use serde_json::json;
use sysbox_tests::beside::{Pair, Side};
use sysbox_tests::runtime::eventually;
use sysbox_tests::terminal::{Listener, Screen, Seat};

/// What a program sees of its terminal: that all three streams are it, its size, whose it is, that it is the controlling
/// one, that signals typed at it go to this session, and what /dev/console is.
const LOOK: &str = r#"b=/bin/busybox
test -t 0 && test -t 1 && test -t 2 && echo three
$b tty
stty size
for f in /proc/self/fd/0 $($b tty) /dev/console /dev/tty /dev/ptmx; do
    stat -L -c "%n %u:%g %a %t:%T" $f
done
echo to it >/dev/tty && echo controlling
set -- $($b cat /proc/self/stat); echo session $(($6 == $5)) $(($8 == $5))
$b grep -c " /dev/console " /proc/self/mountinfo
id
echo DONE"#;

fn look_with(first: &str) -> serde_json::Value {
    json!(["/bin/busybox", "sh", "-c", format!("{first}{}", LOOK.replace("stty", "$b stty"))])
}

/// What both screens show must be the same, but for what is this side's own.
#[track_caller]
fn same(of: impl Fn(&Side) -> String, pair: &Pair) -> String {
    let (ours, runcs) = (of(&pair.ours), of(&pair.runcs));
    assert_eq!(ours, runcs, "ours, runc's");
    ours
}

#[test]
fn a_container_has_the_terminal_whose_master_was_handed_out() {
    for (user, size) in [(0, None), (7, Some((33, 77)))] {
        let pair = Pair::new(&[]);
        pair.edit(|config| {
            config["process"]["args"] = look_with("read x; ");
            config["process"]["terminal"] = json!(true);
            config["process"]["user"] = json!({"uid": user, "gid": user});
            if let Some((height, width)) = size {
                config["process"]["consoleSize"] = json!({"height": height, "width": width});
            }
        });
        let text = same(
            |side| {
                let socket = side.dir.join("console");
                let listener = Listener::at(&socket);
                let said = side.say("create --console-socket {d}/console -b {b} {id}", &pair.id);
                assert_eq!((said.code, said.err.as_str()), (0, ""), "{side:?}");
                let (_, master) = listener.take();
                assert!(!listener.has_more());
                assert_eq!(side.say("start {id}", &pair.id).code, 0);
                let mut screen = Screen::new(master);
                if size.is_none() {
                    screen.resize(91, 19);
                }
                screen.type_in("\n");
                let text = screen.to_end();
                eventually("it has ended", || side.say("state {id}", &pair.id).out.contains("\"stopped\""));
                side.say("delete {id}", &pair.id);
                text
            },
            &pair,
        );
        let size = size.map_or("19 91".to_owned(), |(height, width)| format!("{height} {width}"));
        for part in ["three", "/dev/pts/0", &size, "controlling", "session 1 1", "DONE"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains(&format!("/dev/pts/0 {user}:")), "{text}");
    }
}

/// The name is for people: both are the container's multiplexer.
#[test]
fn the_master_comes_with_a_name() {
    let pair = Pair::new(&["/bin/true"]);
    pair.edit(|config| config["process"]["terminal"] = json!(true));
    for (side, name) in [(&pair.ours, "/dev/ptmx"), (&pair.runcs, "/dev/pts/ptmx")] {
        let listener = Listener::at(&side.dir.join("console"));
        let said = side.say("run -d --console-socket {d}/console -b {b} {id}", &pair.id);
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{side:?}");
        assert_eq!(listener.take().0, name);
    }
}

#[test]
fn a_later_process_has_a_terminal_of_its_own() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    pair.both_ok("run -d -b {b} {id}");
    let script = LOOK.replace("stty", "$b stty");
    for side in [&pair.ours, &pair.runcs] {
        fs::write(side.bundle.rootfs().join("look"), &script).unwrap();
    }
    for (n, flags) in ["", "-u 7:8", "--cwd /bin -e A=1"].iter().enumerate() {
        let text = same(
            |side| {
                let listener = Listener::at(&side.dir.join(format!("console{n}")));
                let line = format!(
                    "exec -t -d --console-socket {{d}}/console{n} --pid-file {{d}}/pid{n} {flags} {{id}} /bin/sh -c read~x;.~/look"
                );
                let said = side.say(&line, &pair.id);
                assert_eq!((said.code, said.err.as_str()), (0, ""), "{side:?}");
                let pid: i32 = fs::read_to_string(side.dir.join(format!("pid{n}"))).unwrap().parse().unwrap();
                assert!(fs::exists(format!("/proc/{pid}")).unwrap());
                let mut screen = Screen::new(listener.take().1);
                screen.resize(100, 50);
                screen.type_in("\n");
                screen.to_end()
            },
            &pair,
        );
        for part in ["three", "/dev/pts/", "50 100", "controlling", "session 1 1", "DONE"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

#[test]
fn called_from_a_terminal_run_and_exec_join_it_to_the_containers() {
    let pair = Pair::new(&[]);
    // runc gives the size when the program runs already.
    let size = "/bin/busybox stty size";
    let ask =
        format!("until test \"$({size} 2>&1)\" = '30 90'; do :; done; read x; echo got $x; {size}; exit 5");
    pair.edit(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["args"] = json!(["/bin/sh", "-c", ask]);
    });
    let drive = |side: &Side, line: &str| {
        let mut seat = Seat::call(side, line, &pair.id, 90, 30);
        seat.until_raw();
        seat.screen.type_in("words\r");
        let (code, text) = seat.end();
        format!("{code} {text}")
    };
    let text = same(|side| drive(side, "run -b {b} {id}"), &pair);
    assert_eq!(text, "5 words\r\ngot words\r\n30 90\r\n");
    pair.edit(|config| {
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/sleep", "1000"]);
    });
    pair.both_ok("run -d -b {b} {id}");
    let line = format!("exec -t {{id}} /bin/sh -c {}", ask.replace(' ', "~"));
    let text = same(|side| drive(side, &line), &pair);
    assert_eq!(text, "5 words\r\ngot words\r\n30 90\r\n");
    // An interrupt typed at the terminal is the program's, not the runtime's.
    let line = "exec -t {id} /bin/sh -c trap~'echo~caught;exit~9'~INT;while~:;do~read~x;echo~got~$x;done";
    let text = same(
        |side| {
            let mut seat = Seat::call(side, line, &pair.id, 80, 24);
            seat.until_raw();
            seat.screen.type_in("x\r");
            // Its answer: the trap is set.
            seat.screen.until("got x");
            seat.screen.type_in("\u{3}");
            let (code, text) = seat.end();
            format!("{code} {text}")
        },
        &pair,
    );
    assert!(text.starts_with("9 ") && text.contains("caught"), "{text:?}");
}

/// The pid that a pidfd is of.
fn pid_of(pidfd: &impl AsRawFd) -> String {
    let facts = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
    let line = facts.lines().find_map(|line| line.strip_prefix("Pid:")).expect("a pidfd");
    line.trim().to_owned()
}

#[test]
fn a_pidfd_arrives_at_who_listens() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    for (n, line) in [
        "create --pidfd-socket {d}/pidfd0 --pid-file {d}/pid0 -b {b} {id}",
        "exec -d --pidfd-socket {d}/pidfd1 --pid-file {d}/pid1 {id} /bin/sleep 1000",
        "run -d --pidfd-socket {d}/pidfd2 --pid-file {d}/pid2 -b {b} {id}r",
    ]
    .iter()
    .enumerate()
    {
        same(
            |side| {
                let listener = Listener::at(&side.dir.join(format!("pidfd{n}")));
                let said = side.say(line, &pair.id);
                assert_eq!(said.code, 0, "{said:?}");
                let (name, pidfd) = listener.take();
                assert_eq!(pid_of(&pidfd), fs::read_to_string(side.dir.join(format!("pid{n}"))).unwrap());
                assert!(!listener.has_more());
                name
            },
            &pair,
        );
    }
}
