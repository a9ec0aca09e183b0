//! What of an image comes into a container's own layer, in directories that stand for layers.

use super::*;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

const ROOT: &str = "/var/lib/docker";

/// Layers by name in a temporary directory, with an empty `target` beside them.
fn layers(names: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::create_dir_all(dir.path().join(name).join("var/lib/docker")).unwrap();
    }
    std::fs::create_dir(dir.path().join("target")).unwrap();
    let paths = names.iter().map(|name| dir.path().join(name)).collect();
    (dir, paths)
}

fn bring_all(dir: &tempfile::TempDir, lowers: &[PathBuf]) -> PathBuf {
    let target = dir.path().join("target");
    bring(lowers, Path::new(ROOT), File::open(&target).unwrap().as_fd(), dir.path()).unwrap();
    target
}

#[test]
fn what_the_topmost_layer_holds_comes_as_it_lies() {
    let (dir, lowers) = layers(&["none", "top", "low"]);
    let top = lowers[1].join("var/lib/docker");
    std::fs::create_dir_all(top.join("overlay2/x/diff")).unwrap();
    std::fs::write(top.join("a"), "new").unwrap();
    std::os::unix::fs::chown(top.join("a"), Some(77), Some(88)).unwrap();
    std::fs::write(lowers[2].join("var/lib/docker/a"), "old").unwrap();
    let whiteout = top.join("overlay2/x/diff/gone");
    nix::sys::stat::mknod(&whiteout, nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::empty(), 0)
        .unwrap();
    let target = bring_all(&dir, &lowers);
    assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "new");
    assert_eq!(std::fs::metadata(target.join("a")).unwrap().uid(), 77);
    let copied = std::fs::symlink_metadata(target.join("overlay2/x/diff/gone")).unwrap();
    assert!(copied.file_type().is_char_device() && copied.rdev() == 0);
    assert!(!dir.path().join(".sysbox-preload").exists());
}

#[test]
fn it_is_done_once_and_what_is_there_stays() {
    let (dir, lowers) = layers(&["low"]);
    for name in ["a", "b"] {
        std::fs::write(lowers[0].join("var/lib/docker").join(name), "image").unwrap();
    }
    std::fs::write(dir.path().join("target/a"), "mine").unwrap();
    let target = bring_all(&dir, &lowers);
    assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "mine");
    std::fs::remove_file(target.join("b")).unwrap();
    bring_all(&dir, &lowers);
    assert!(!target.join("b").exists());
}

#[test]
fn no_link_of_an_image_is_written_through() {
    let canary = tempfile::tempdir().unwrap();
    let secret = canary.path().join("secret");
    std::fs::write(&secret, "host").unwrap();
    // The place itself a link; a link in a lower layer where an upper one has a file; a link to a directory.
    let (dir, lowers) = layers(&["top", "low", "link"]);
    std::fs::remove_dir(lowers[2].join("var/lib/docker")).unwrap();
    std::os::unix::fs::symlink(canary.path(), lowers[2].join("var/lib/docker")).unwrap();
    for (name, to) in [("x", secret.as_path()), ("d", canary.path())] {
        std::os::unix::fs::symlink(to, lowers[1].join("var/lib/docker").join(name)).unwrap();
    }
    std::fs::write(lowers[0].join("var/lib/docker/x"), "image").unwrap();
    std::fs::create_dir(lowers[0].join("var/lib/docker/d")).unwrap();
    std::fs::write(lowers[0].join("var/lib/docker/d/secret"), "image").unwrap();
    let target = bring_all(&dir, &lowers);
    // Moved to the top the link hides all below it.
    let (other, _) = layers(&[]);
    let hidden = bring_all(&other, &[lowers[2].clone(), lowers[0].clone()]);
    assert!(!hidden.join("x").exists());
    assert_eq!(std::fs::read_to_string(&secret).unwrap(), "host");
    assert_eq!(std::fs::read_to_string(target.join("x")).unwrap(), "image");
}

fn whiteout(path: &Path) {
    nix::sys::stat::mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
}

fn attribute(path: &Path, name: &std::ffi::CStr) -> Option<Vec<u8>> {
    let dir = File::open(path.parent().unwrap()).unwrap();
    AtName { dir: dir.as_fd(), name: path.file_name().unwrap() }.get(name).ok()
}

fn set(path: &Path, name: &std::ffi::CStr, value: &[u8]) {
    xattr::set(File::open(path).unwrap().as_fd(), name, value).unwrap();
}

/// As a pause or a delete does it, of a directory that stands for a writable layer.
fn record(layer: &Path) {
    let carried = carry::Carried { upper: layer.to_owned(), roots: vec![ROOT.into()] };
    assert_eq!(carry::record(&carried), [] as [String; 0]);
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[test]
fn layers_are_laid_over_one_another_and_a_whiteout_is_whose_it_is() {
    let (dir, lowers) = layers(&["top", "low"]);
    let [top, low] = [0, 1].map(|number: usize| lowers[number].join("var/lib/docker"));
    for name in ["a", "b", "d/old", "turned/into", "overlay2/x/diff/f", "overlay2/x/diff/g"] {
        write(&low.join(name), "low");
    }
    write(&top.join("a"), "top");
    whiteout(&top.join("b"));
    write(&top.join("d/new"), "top");
    set(&top.join("d"), OPAQUE, b"y");
    write(&top.join("turned"), "a file");
    write(&top.join("overlay2/x/diff/opaque/new"), "top");
    whiteout(&top.join("overlay2/x/diff/f"));
    set(&top.join("overlay2/x/diff/opaque"), OPAQUE, b"y");
    let target = bring_all(&dir, &lowers);
    let read = |name: &str| std::fs::read_to_string(target.join(name)).ok();
    assert_eq!(read("a").as_deref(), Some("top"));
    assert!(!target.join("b").exists() && !target.join("d/old").exists());
    assert_eq!(read("d/new").as_deref(), Some("top"));
    assert_eq!(read("turned").as_deref(), Some("a file"));
    assert_eq!(read("overlay2/x/diff/g").as_deref(), Some("low"));
    assert!(
        std::fs::symlink_metadata(target.join("overlay2/x/diff/f")).unwrap().file_type().is_char_device()
    );
    assert_eq!(
        attribute(&target.join("overlay2/x/diff/opaque"), c"user.overlay.opaque"),
        Some(b"y".to_vec())
    );
    assert_eq!(attribute(&target.join("d"), c"user.overlay.opaque"), None);
    // A layer whose directory replaces those below it.
    set(&lowers[0].join("var/lib"), OPAQUE, b"y");
    let (other, _) = layers(&[]);
    assert!(!bring_all(&other, &lowers).join("overlay2/x/diff/g").exists());
}

#[test]
fn what_an_archive_drops_is_put_back() {
    let (dir, lowers) = layers(&["top"]);
    let top = lowers[0].join("var/lib/docker");
    let files = top.join("overlay2/x/diff");
    write(&files.join("dir/file"), "text");
    set(&files.join("dir"), c"user.overlay.opaque", b"y");
    set(&files.join("dir"), c"user.overlay.origin", b"of this disk");
    set(&files.join("dir/file"), c"user.mine", b"\0value");
    whiteout(&files.join("gone"));
    mknodat(File::open(&files).unwrap(), "socket", SFlag::S_IFSOCK, Mode::from_bits_truncate(0o700), 0)
        .unwrap();
    let times = |at: &Path| std::fs::symlink_metadata(at).map(|f| (f.mtime(), f.mtime_nsec())).unwrap();
    let names = ["", "dir", "dir/file"];
    let before = names.map(|name| times(&files.join(name)));
    record(&lowers[0]);
    // What an engine that compares trees, and drops what archives drop, would make of it.
    std::fs::remove_dir_all(&files).unwrap();
    write(&files.join("dir/file"), "text");
    for (name, (seconds, _)) in names.iter().zip(before).rev() {
        let (path, mtime) = (files.join(name), TimeSpec::new(seconds, 0));
        set_mtime(File::open(files.parent().unwrap()).unwrap().as_fd(), &path, mtime).unwrap();
    }
    let target = bring_all(&dir, &lowers);
    let files = target.join("overlay2/x/diff");
    assert_eq!(attribute(&files.join("dir"), c"user.overlay.opaque"), Some(b"y".to_vec()));
    assert_eq!(attribute(&files.join("dir"), c"user.overlay.origin"), None);
    assert_eq!(attribute(&files.join("dir/file"), c"user.mine"), Some(b"\0value".to_vec()));
    assert!(std::fs::symlink_metadata(files.join("gone")).unwrap().file_type().is_char_device());
    let socket = std::fs::symlink_metadata(files.join("socket")).unwrap();
    assert!(socket.file_type().is_socket() && socket.mode() & 0o7777 == 0o700);
    assert_eq!(names.map(|name| times(&files.join(name))), before);
    // It is true only as long as nobody writes there.
    assert!(!target.join(list::NAME).exists());
}

#[test]
fn what_was_deleted_before_the_list_was_written_stays_deleted() {
    let (dir, lowers) = layers(&["top", "low"]);
    let [top, low] = [0, 1].map(|number: usize| lowers[number].join("var/lib/docker"));
    for name in ["image/old", "image/kept", "overlay2/old/diff/f"] {
        write(&low.join(name), "low");
    }
    write(&top.join("image/kept"), "low");
    write(&top.join("image/new"), "top");
    record(&lowers[0]);
    let names = |target: &Path| {
        let mut names: Vec<_> =
            std::fs::read_dir(target.join("image")).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        (names, target.join("overlay2/old").exists())
    };
    let expected = (vec!["kept".into(), "new".into()], false);
    assert_eq!(names(&bring_all(&dir, &lowers)), expected);
    // One that has only what changed says the same with its list.
    std::fs::remove_file(top.join("image/kept")).unwrap();
    let (other, _) = layers(&[]);
    assert_eq!(names(&bring_all(&other, &lowers)), expected);
}

#[test]
fn a_copy_that_was_cut_off_is_begun_again() {
    let (dir, lowers) = layers(&["low"]);
    for name in ["a", "b", "c"] {
        write(&lowers[0].join("var/lib/docker").join(name), "whole");
    }
    // Killed while it moved what was whole: one is there already, another not.
    write(&dir.path().join(".sysbox-preload/b"), "hal");
    write(&dir.path().join("target/a"), "whole");
    let target = bring_all(&dir, &lowers);
    for name in ["a", "b", "c"] {
        assert_eq!(std::fs::read_to_string(target.join(name)).unwrap(), "whole");
    }
    assert!(!dir.path().join(".sysbox-preload").exists());
}

#[test]
fn a_hostile_list_harms_nobody() {
    let canary = tempfile::tempdir().unwrap();
    write(&canary.path().join("secret"), "host");
    for text in [
        "sysbox carried 1\n../../secret user.a=00\n",
        "sysbox carried 1\nlink/secret user.a=00\nlink/new whiteout\n",
        "sysbox carried 1\na trusted.overlay.redirect=2f\n",
        "what\n",
        "",
    ] {
        let (dir, lowers) = layers(&["low"]);
        let low = lowers[0].join("var/lib/docker");
        write(&low.join("a"), "image");
        std::os::unix::fs::symlink(canary.path(), low.join("link")).unwrap();
        write(&low.join(list::NAME), text);
        let target = bring_all(&dir, &lowers);
        assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "image", "{text}");
        assert_eq!(std::fs::read_dir(canary.path()).unwrap().count(), 1, "{text}");
        assert_eq!(attribute(&canary.path().join("secret"), c"user.a"), None, "{text}");
        assert_eq!(attribute(&target.join("a"), c"trusted.overlay.redirect"), None, "{text}");
    }
    // A list that is no file, which would hold up whoever opens it.
    let (dir, lowers) = layers(&["low"]);
    let low = lowers[0].join("var/lib/docker");
    write(&low.join("a"), "image");
    nix::unistd::mkfifo(&low.join(list::NAME), Mode::from_bits_truncate(0o600)).unwrap();
    assert!(bring_all(&dir, &lowers).join("a").exists());
}
