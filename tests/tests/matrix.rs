//! What people run inside, in many versions: each row of a table is a part, and its trials are another table. Adding a release is
//! adding a line. A few rows are tried every time; `make test-matrix` tries all and prints docs/COMPATIBILITY.md.

#[path = "matrix/docker.rs"]
mod docker;

use sysbox_tests::matrix::try_all;

#[test]
fn docker_of_every_release_works_inside() {
    try_all(&docker::parts());
}
