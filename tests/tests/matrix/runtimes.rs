//! Runtimes below an inner engine: which, of which release, and what is tried with each.

use sysbox_tests::engine::INNER_IMAGE;
use sysbox_tests::matrix::{Built, Part, Trial};

use crate::docker::{BASIC, LEGACY, PRIVILEGED};

const SECTION: &str = "Runtimes of an inner Docker";

/// In `trixie`: runc as published, and whether it is tried every time.
const RUNC: &[(&str, bool)] = &[
    ("1.1.14", false),
    ("1.2.8", false),
    ("1.3.6", false),
    ("1.4.3", false),
    ("1.5.2", true),
    ("1.6.0-rc.1", false),
];

/// With Debian's own crun.
const CRUN: &[&str] = &["bookworm-engines", "trixie-engines", "sid-engines"];

const TRIALS: &[&[Trial]] = &[BASIC, PRIVILEGED, LEGACY];

pub fn parts() -> Vec<Part> {
    const PATH: &str = "/usr/local/sbin/runc-tried";
    let runc = RUNC.iter().map(|(release, is_daily)| Part {
        built: vec![Built { name: "runc", version: release, at: PATH }],
        is_daily: *is_daily,
        ..part(&format!("runc {release}"), "trixie", PATH)
    });
    let crun = CRUN.iter().map(|image| part(&format!("crun of {image}"), image, "/usr/bin/crun"));
    runc.chain(crun).collect()
}

fn part(name: &str, image: &str, path: &str) -> Part {
    let config = format!(r#"{{"runtimes": {{"tried": {{"path": "{path}"}}}}, "default-runtime": "tried"}}"#);
    Part {
        section: SECTION,
        name: name.to_owned(),
        image: image.to_owned(),
        init: format!("mkdir -p /etc/docker; echo '{config}' >/etc/docker/daemon.json; exec dockerd"),
        ready: format!("docker version && docker import {INNER_IMAGE} busybox"),
        version: format!("{path} --version | head -n 1; docker version -f 'Docker {{{{.Server.Version}}}}'"),
        trials: TRIALS.to_vec(),
        ..Part::default()
    }
}
