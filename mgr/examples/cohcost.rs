//! What the manager costs while containers do nothing: `cohcost PATH-OF-SYSBOX-MGR [CONTAINERS] [SECONDS]` makes so many, each
//! with two overlays, and tells the manager's processor time and memory. Needs root, and touches nothing but /tmp.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measure, for a person")]

#[path = "../tests/bed/mod.rs"]
mod bed;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sysbox_ipc::mgr::{Register, Reply, Request, Rootfs};
use sysbox_ipc::{ContainerId, ContainerKey, Hello};
use sysbox_sys::process::identify;
use sysbox_sys::socket::Connection;

use bed::{Bed, eventually};

fn main() {
    let mut args = std::env::args().skip(1);
    let program = args.next().unwrap();
    let mut number = |otherwise| args.next().map_or(otherwise, |text| text.parse::<u64>().unwrap());
    let (containers, seconds) = (number(30), number(30));
    let beds: Vec<Bed> = (0..containers).map(|_| Bed::unwatched()).collect();
    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("etc")).unwrap();
    let mut command = Command::new(program);
    for (flag, name) in
        [("--data-root", "data"), ("--run-dir", "run"), ("--subid-files", "etc"), ("--log", "log")]
    {
        command.arg(flag).arg(home.path().join(name));
    }
    let mut daemon = command.args(["--subid-range", "2684354560:16777216"]).spawn().unwrap();
    let socket = home.path().join("run").join(sysbox_ipc::mgr::SOCKET);
    eventually("the daemon listens", || Connection::connect(&socket).is_ok());
    let connection = Connection::connect(&socket).unwrap();
    let ask = |request: Request| connection.call::<_, Reply>(&request, &[]).unwrap().0;
    ask(Request::Hello(Hello::from_program("cohcost")));
    for (at, bed) in beds.iter().enumerate() {
        let key = ContainerKey::new(Path::new("/run/r"), ContainerId::parse(&format!("c{at}")).unwrap());
        let register = Register {
            key: key.clone(),
            bundle: bed.path("bundle"),
            runtime: identify(i32::try_from(std::process::id()).unwrap()).unwrap(),
            rootfs: Rootfs::Overlay { merged: bed.path("id/merged"), upper: bed.path("id/diff") },
            id_map: None,
            netns: None,
            users: None,
            claims: vec![],
        };
        assert!(matches!(ask(Request::Register(Box::new(register))), Reply::Granted(_)));
        let init = identify(i32::try_from(bed.init.id()).unwrap()).unwrap();
        assert_eq!(ask(Request::Started { key, init }), Reply::Done);
    }
    // The looks after a start are over by then.
    std::thread::sleep(Duration::from_secs(10));
    let pid = daemon.id();
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let nanoseconds = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let of = |task: std::io::Result<std::fs::DirEntry>| {
            let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
            text.split(' ').next().unwrap().parse::<u64>().unwrap()
        };
        tasks.map(of).sum()
    };
    let begin = nanoseconds();
    std::thread::sleep(Duration::from_secs(seconds));
    let spent = (nanoseconds() - begin) / 1000;
    let status = read("status");
    let memory = status.lines().filter(|line| line.starts_with("VmRSS") || line.starts_with("RssAnon"));
    println!(
        "{containers} containers, {seconds} s: {spent} µs of processor; {:?}",
        memory.collect::<Vec<_>>()
    );
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}
