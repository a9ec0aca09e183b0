//! What people run inside, in many versions: each row of a table is a part, and its trials are another table. Adding a release is
//! adding a line. A few rows are tried every time; `make test-matrix` tries all and prints docs/COMPATIBILITY.md.

#[path = "matrix/docker.rs"]
mod docker;
#[path = "matrix/engines.rs"]
mod engines;
#[path = "matrix/runtimes.rs"]
mod runtimes;
#[path = "matrix/tools.rs"]
mod tools;

use sysbox_tests::matrix::try_all;

#[test]
fn docker_of_every_release_works_inside() {
    try_all(&docker::parts());
}

#[test]
fn runtimes_of_every_release_work_below_an_inner_docker() {
    try_all(&runtimes::parts());
}

#[test]
fn podman_buildah_and_containerd_work_inside() {
    try_all(&engines::parts());
}

#[test]
fn what_people_run_in_a_machine_works_or_says_why_not() {
    try_all(&tools::parts());
}
