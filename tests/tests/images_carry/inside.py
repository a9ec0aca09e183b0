# Runs in the outer container: makes what inner images are to be carried with, and tells every attribute of a tree.
#     inside.py base DIR          puts everything odd into an image's root
#     inside.py change DIR        what a running inner container does to its own files
#     inside.py manifest DIR      a line a file
import hashlib, os, stat, sys

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service+ep


def base(top):
    at = lambda name: os.path.join(top, name)

    def add(name, data=b"", mode=0o644, uid=0, gid=0):
        with open(at(name), "wb") as file:
            file.write(data)
        os.chown(at(name), uid, gid)
        os.chmod(at(name), mode)

    os.mkdir(at("odd"))
    for number, name in enumerate(["sp ace", "new\nline", "back\\slash", "e=qual", "-dash", "\u00fcml\u00e4ut", "x" * 200]):
        add("odd/" + name, name.encode(), 0o600 + number, number, 1000)
    add("odd/setuid", b"#!/bin/sh\n", 0o4755)
    add("odd/setgid", b"#!/bin/sh\n", 0o2711, 65534, 65534)
    add("odd/none", b"secret", 0)
    add("odd/able", b"\x7fELF", 0o755)
    os.setxattr(at("odd/able"), "security.capability", CAPABILITY)
    add("odd/first", b"linked")
    os.link(at("odd/first"), at("odd/second"))
    os.symlink("/nowhere/at all", at("odd/dangling"))
    os.mkfifo(at("odd/fifo"), 0o640)
    os.chown(at("odd"), 7, 8)
    os.chmod(at("odd"), 0o1770)
    for place in ["replaced", "emptied", "deep/replaced", "kept"]:
        os.makedirs(at(place + "/hidden"))
        for name in ["old", "both", "hidden/below"]:
            add(place + "/" + name, b"old " + name.encode())
        os.chmod(at(place + "/hidden"), 0o700)
    for name in ["gone1", "gone2", "gone3"]:
        add("kept/" + name, b"gone")


def change(top):
    at = lambda name: os.path.join(top, name)
    os.unlink(at("kept/gone1"))
    for name in ["replaced", "deep/replaced"]:
        for found, directories, files in os.walk(at(name), topdown=False):
            for file in files:
                os.unlink(os.path.join(found, file))
            os.rmdir(found)
        os.mkdir(at(name), 0o751)
        with open(at(name + "/both"), "w") as file:
            file.write("new")
    os.makedirs(at("mine/inner dir"))
    with open(at("mine/sparse"), "wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"in the middle")
    with open(at("mine/attributes"), "w") as file:
        file.write("x")
    os.setxattr(at("mine/attributes"), "user.with space=and", b"\x00\xff value")
    os.setxattr(at("mine/attributes"), "user.empty", b"")
    os.setxattr(at("mine/attributes"), "security.capability", CAPABILITY)
    os.setxattr(at("mine/inner dir"), "user.dir", b"d" * 1000)
    os.setxattr(at("kept/old"), "user.on-a-copied-up-one", b"1")
    # user::rw-, user:1234:r--, group::r--, mask::r--, other::---
    acl = "02000000" "01000600ffffffff" "02000400d2040000" "04000400ffffffff" "10000400ffffffff" "20000000ffffffff"
    os.setxattr(at("mine/attributes"), "system.posix_acl_access", bytes.fromhex(acl))
    os.setxattr(at("mine/inner dir"), "system.posix_acl_default", bytes.fromhex(acl))
    os.mknod(at("mine/socket"), stat.S_IFSOCK | 0o700)
    os.chmod(at("mine/socket"), 0o765)
    os.link(at("mine/attributes"), at("mine/linked"))
    for number, name in enumerate(["mine/sparse", "mine/socket", "mine/inner dir", "kept", "mine"]):
        os.utime(at(name), ns=(0, 1_234_567_890_123_456_789 + number))
    os.symlink("target", at("mine/link"))
    os.utime(at("mine/link"), ns=(0, 987_654_321), follow_symlinks=False)


def manifest(top):
    seen = {}
    for found, directories, files in os.walk(top):
        directories.sort()
        for name in ["."] * (found == top) + sorted(directories + files):
            path = os.path.join(found, name)
            facts = os.lstat(path)
            shown = os.path.relpath(path, top)
            line = {"path": ascii(shown), "mode": oct(facts.st_mode), "uid": facts.st_uid, "gid": facts.st_gid,
                    "mtime": facts.st_mtime_ns, "rdev": facts.st_rdev}
            if not stat.S_ISDIR(facts.st_mode):
                line["size"], line["links"] = facts.st_size, facts.st_nlink
                line["first"] = ascii(seen.setdefault(facts.st_ino, shown))
            if stat.S_ISREG(facts.st_mode):
                with open(path, "rb") as file:
                    line["hash"] = hashlib.sha256(file.read()).hexdigest()
            elif stat.S_ISLNK(facts.st_mode):
                line["target"] = ascii(os.readlink(path))
            line["xattrs"] = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(os.listxattr(path, follow_symlinks=False))}
            print(line)


{"base": base, "change": change, "manifest": manifest}[sys.argv[1]](sys.argv[2])
