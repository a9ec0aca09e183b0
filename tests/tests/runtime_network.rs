//! Network namespaces that come by path: made by the host's root (`ip netns`, a pod's sandbox), shared by several containers.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine};

/// One that `ip netns` made, with a pair of interfaces; it goes when this is dropped.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("sbxtest{}n{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let netns = Self(name);
        netns.ip(&["netns", "add", &netns.0]);
        netns.ip(&["-n", &netns.0, "link", "set", "lo", "up"]);
        netns.ip(&["-n", &netns.0, "link", "add", "ve0", "type", "veth", "peer", "name", "ve1"]);
        netns
    }

    fn ip(&self, args: &[&str]) {
        assert!(Command::new("ip").args(args).status().unwrap().success(), "ip {args:?}");
    }

    fn is_given_to(&self, bundle: &Bundle) {
        bundle.edit(|config| {
            for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(format!("/run/netns/{}", self.0));
                }
            }
        });
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.ip(&["netns", "del", &self.0]);
    }
}

/// A container that waits in it; what the runtime warned of is in the file.
fn start(machine: &Machine, netns: &Netns, id: &str, log: &Path) {
    let bundle = machine.bundle(id, &["/bin/sleep", "1000"]);
    netns.is_given_to(&bundle);
    let mut command = machine.command();
    command.arg("--log").arg(log).args(["run", "--detach", "--bundle"]).arg(&bundle.dir).arg(id);
    // Not a pipe: the container's program holds it as long as it runs.
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success(), "{}", fs::read_to_string(log).unwrap());
}

#[test]
fn a_network_namespace_of_the_hosts_root_works_with_its_sysfs_and_one_warning() {
    let (machine, netns) = (Machine::start(), Netns::new());
    let log = machine.path("log");
    start(&machine, &netns, "c", &log);
    let inside = |script: &str| machine.runc(&["exec", "c", "/bin/sh", "-c", script]);
    // Its interfaces, and not the host's; in both places where a sysfs is expected.
    assert_eq!(
        inside("ls /sys/class/net /dev/.lxc/sys/class/net").ok(),
        "/dev/.lxc/sys/class/net:\nlo\nve0\nve1\n\n/sys/class/net:\nlo\nve0\nve1\n"
    );
    let pid = machine.state("c")["pid"].to_string();
    let of =
        |path: &str| fs::metadata(path).map(|facts| std::os::unix::fs::MetadataExt::ino(&facts)).unwrap();
    assert_eq!(of(&format!("/proc/{pid}/ns/net")), of(&format!("/run/netns/{}", netns.0)));
    // The rights over it stay the host's.
    assert_ne!(inside("echo 1 >/proc/sys/net/ipv4/ip_forward").code, 0);
    assert_ne!(inside("mount -t sysfs s /mnt").code, 0);
    let warnings = fs::read_to_string(&log).unwrap();
    assert_eq!(warnings.matches("network namespace").count(), 1, "{warnings}");
    assert_eq!(warnings.matches("level=warning").count(), 1, "{warnings}");
    machine.runc(&["delete", "--force", "c"]).ok();
}

#[test]
fn containers_in_one_given_network_namespace_share_their_ids() {
    let (machine, netns) = (Machine::start(), Netns::new());
    let start = |id: &str| {
        start(&machine, &netns, id, &machine.path("log"));
        machine.state(id)["pid"].to_string()
    };
    let [one, two] = ["one", "two"].map(start);
    for namespace in ["user", "net"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_eq!(of(&one), of(&two), "{namespace}");
    }
    assert_eq!(machine.runc(&["exec", "two", "/bin/ls", "/sys/class/net"]).ok(), "lo\nve0\nve1\n");
    for id in ["one", "two"] {
        machine.runc(&["delete", "--force", id]).ok();
    }
}
