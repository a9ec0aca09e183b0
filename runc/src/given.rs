//! The namespaces that a spec gives by path: whose they are, who enters them, and what the container sees of a network that is
//! not its own. Refuses to know what else a container is made of.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Spec};
use sysbox_ipc::mgr::{FileId, Grant};
use sysbox_sys::mount::{Attributes, FsContext, attach};
use sysbox_sys::path::proc_path;
use sysbox_sys::process::Held;
use sysbox_sys::userns;

use crate::bundle;
use crate::plan::Stage;

/// The namespaces that the spec gives by path, opened once: what was judged is what is joined, though the path may go
/// through a pid that is another's by then.
#[derive(Debug)]
pub struct Given(Vec<GivenNamespace>);

#[derive(Debug)]
struct GivenNamespace {
    typ: LinuxNamespaceType,
    file: OwnedFd,
    /// The user namespace that it belongs to; `None` for the host's.
    owner: Option<FileId>,
}

impl Given {
    /// # Errors
    /// A path that is none, a kind that is always the container's own, the host's own namespace.
    pub fn open(spec: &Spec) -> Result<Self> {
        let mut all = Vec::new();
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
        let host = std::fs::File::open("/proc/self/ns/user").context("our own namespace")?;
        let host = identity(&host.into())?;
        for namespace in namespaces.unwrap_or_default() {
            let Some(path) = namespace.path() else { continue };
            let typ = namespace.typ().to_string();
            if matches!(typ.as_str(), "user" | "mnt" | "time") {
                bail!(
                    "/linux/namespaces: a {typ} namespace is always the container's own; it cannot be given by path"
                );
            }
            let opened = std::fs::File::open(path);
            let file = OwnedFd::from(opened.with_context(|| format!("namespace {}", path.display()))?);
            let ours = std::fs::File::open(format!("/proc/self/ns/{typ}")).context("our own namespace")?;
            if identity(&file)? == identity(&ours.into())? {
                if namespace.typ() == LinuxNamespaceType::Network {
                    bail!("/linux/namespaces: {}", bundle::HOST_NETWORK);
                }
                bail!("/linux/namespaces: sysbox containers can't share namespaces {{{typ}}} with the host");
            }
            let owner = userns::owner_of(file.as_fd());
            let owner = owner.with_context(|| format!("namespace {}", path.display()))?;
            let owner = Some(identity(&owner)?).filter(|owner| *owner != host);
            all.push(GivenNamespace { typ: namespace.typ(), file, owner });
        }
        Ok(Self(all))
    }

    /// # Errors
    /// `fstat` failing.
    pub fn network(&self) -> Result<Option<FileId>> {
        let network = self.0.iter().find(|given| given.typ == LinuxNamespaceType::Network);
        network.map(|given| identity(&given.file)).transpose()
    }

    /// The user namespace that they belong to, if that is not the host's.
    ///
    /// # Errors
    /// Several that do.
    pub fn users(&self) -> Result<Option<FileId>> {
        let mut owners = self.0.iter().filter_map(|given| given.owner);
        let first = owners.next();
        if owners.any(|owner| Some(owner) != first) {
            bail!("/linux/namespaces: those given by path belong to containers with different ids");
        }
        Ok(first)
    }

    /// Those of another user namespace: the container's root may not enter them, so this process does, and its children
    /// are born there. Those of the shared user namespace init enters itself, by our descriptors.
    ///
    /// # Errors
    /// A pid namespace that nobody with a user namespace of his own may show in a procfs; `setns`.
    pub fn join(&self, mut spec: Spec, grant: &Grant) -> Result<(Spec, Joined)> {
        let mut foreign_network = false;
        let Some(mut linux) = spec.linux().clone() else {
            return Ok((spec, Joined { _users: Vec::new(), foreign_network }));
        };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        let mut partner = Vec::new();
        if let Some(process) = grant.share_with {
            partner = Held::open(process)
                .and_then(|held| held.namespaces(&["user"]))
                .context("join the user namespace of the container whose namespaces are shared")?;
        }
        let theirs = partner.first().map(identity).transpose()?;
        for GivenNamespace { typ, file, owner } in &self.0 {
            if owner.is_some() && *owner == theirs {
                name(&mut namespaces, *typ, file);
                continue;
            }
            let flag = match typ {
                LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
                LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
                LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
                _ => bail!(
                    "/linux/namespaces: can't join the {typ} namespace of a process that is in no sysbox container: it \
                     belongs to that process's user namespace"
                ),
            };
            setns(file, flag).with_context(|| format!("join the given {typ} namespace"))?;
            foreign_network |= *typ == LinuxNamespaceType::Network;
            namespaces.retain(|namespace| namespace.typ() != *typ);
        }
        for file in &partner {
            name(&mut namespaces, LinuxNamespaceType::User, file);
        }
        linux.set_namespaces(Some(namespaces));
        spec.set_linux(Some(linux));
        Ok((spec, Joined { _users: partner, foreign_network }))
    }
}

/// What this process has joined.
#[derive(Debug)]
pub struct Joined {
    /// The user namespace that init joins, to be kept open until init exists.
    _users: Vec<OwnedFd>,
    /// The network namespace belongs to another user namespace than the container's.
    foreign_network: bool,
}

impl Joined {
    /// A sysfs shows the network namespace in which it was mounted, and only who has rights over that may mount one: not the
    /// container. So this process, which is in it, mounts it on the stage, and init binds that. Returns a warning.
    ///
    /// # Errors
    /// The mount failing.
    pub fn show_network(&self, spec: &mut Spec, stage: &Stage) -> Result<Option<String>> {
        if !self.foreign_network {
            return Ok(None);
        }
        let source = stage.dir.join("sys");
        let is_sysfs = |mount: &Mount| mount.typ().as_deref() == Some("sysfs");
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        if mounts.iter().any(is_sysfs) {
            let sysfs = FsContext::open("sysfs").and_then(|context| {
                context.set_text("source", "sysfs")?;
                context.create()?;
                context.mount(Attributes { nosuid: true, nodev: true, noexec: true, ..Attributes::default() })
            });
            let sysfs = sysfs.context("mount sysfs for the given network namespace")?;
            std::fs::create_dir(&source).with_context(|| format!("mkdir {}", source.display()))?;
            let point = std::fs::File::open(&source).with_context(|| format!("open {}", source.display()))?;
            attach(sysfs.as_fd(), point.as_fd()).context("mount sysfs on the stage")?;
        }
        for mount in mounts.iter_mut().filter(|mount| is_sysfs(mount)) {
            let mut options = mount.options().clone().unwrap_or_default();
            options.push("bind".to_owned());
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(source.clone()));
            mount.set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
        Ok(Some(
            "/linux/namespaces: the given network namespace belongs to the host: the container has no rights over it, so an \
             engine inside cannot set up its networks; hint: let the container have a namespace of its own"
                .to_owned(),
        ))
    }
}

fn name(namespaces: &mut [LinuxNamespace], typ: LinuxNamespaceType, file: &OwnedFd) {
    for namespace in namespaces.iter_mut().filter(|namespace| namespace.typ() == typ) {
        namespace.set_path(Some(proc_path(file.as_fd())));
    }
}

fn identity(file: &OwnedFd) -> Result<FileId> {
    let facts = nix::sys::stat::fstat(file).context("fstat(namespace)")?;
    Ok(FileId { dev: facts.st_dev, ino: facts.st_ino })
}
