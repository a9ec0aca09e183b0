//! The ledger as data: what each request gives, and that no sequence of them makes ids overlap.

use std::cell::RefCell;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use sysbox_ipc::ContainerId;
use sysbox_ipc::mgr::Ancestor;

const POOL: IdRange = IdRange { start: 0x7000_0000, count: 4 * DEFAULT_IDS };

fn key(id: &str) -> ContainerKey {
    ContainerKey::new(std::path::Path::new("/run/r"), ContainerId::parse(id).unwrap())
}

fn process(pid: i32) -> Process {
    Process { pid, start_ticks: 7 }
}

fn overlay(id: &str) -> Rootfs {
    Rootfs::Overlay {
        merged: PathBuf::from(format!("/o/{id}/merged")),
        upper: PathBuf::from(format!("/o/{id}/diff")),
    }
}

fn request(id: &str, runtime: i32) -> Register {
    Register {
        key: key(id),
        bundle: "/b".into(),
        runtime: process(runtime),
        rootfs: overlay(id),
        id_map: None,
        netns: None,
        users: None,
        claims: vec![],
    }
}

fn netns(ino: u64) -> Option<FileId> {
    Some(FileId { dev: 4, ino })
}

fn ledger() -> Ledger {
    Ledger::new(POOL, netns(1))
}

const ALL: &dyn Fn(Process) -> bool = &|_| true;
const NONE: &dyn Fn(Process) -> bool = &|_| false;

fn add(ledger: &mut Ledger, request: &Register) -> Registered {
    let registered = ledger.register(request, ALL).unwrap();
    ledger.commit(registered.record.clone());
    registered
}

fn start(ledger: &mut Ledger, id: &str, init: i32, netns: Option<FileId>) {
    let record = ledger.started(&key(id), process(init), Common { netns, users: None }, ALL).unwrap();
    ledger.commit(record);
}

fn base(registered: &Registered) -> u32 {
    (registered.record.id_map.root_uid() - POOL.start) / DEFAULT_IDS
}

#[test]
fn each_gets_the_first_free_range_and_slot() {
    let mut ledger = ledger();
    for (at, id) in ["a", "b", "c"].into_iter().enumerate() {
        let got = add(&mut ledger, &request(id, 10));
        assert_eq!((base(&got) as usize, got.record.slot as usize), (at, at));
    }
    ledger.remove(&key("b"));
    let got = add(&mut ledger, &request("d", 10));
    assert_eq!((base(&got), got.record.slot), (1, 1));
}

#[test]
fn the_same_name_gets_the_same_ids_again_once_it_is_dead() {
    let mut ledger = ledger();
    add(&mut ledger, &request("a", 10));
    let first = add(&mut ledger, &request("b", 11));
    start(&mut ledger, "b", 12, netns(2));
    let refused = ledger.register(&request("b", 13), ALL).unwrap_err();
    assert_eq!(
        (refused.kind, refused.message.as_str()),
        (RefusalKind::Exists, "register container `b`: it exists and is running")
    );
    ledger.remove(&key("a"));
    let again = ledger.register(&request("b", 13), NONE).unwrap();
    assert_eq!((base(&again), again.record.slot), (base(&first), first.record.slot));
}

#[test]
fn exhaustion_is_said_and_nothing_is_shared() {
    let mut ledger = ledger();
    for id in ["a", "b", "c", "d"] {
        add(&mut ledger, &request(id, 10));
    }
    let refused = ledger.register(&request("e", 10), ALL).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Exhausted);
    assert_eq!(
        refused.message,
        "allocate ids for container `e`: all ranges of 65536 ids in 1879048192..1879310336 are taken (4 containers run, \
         0 are stopped)"
    );
    assert!(refused.hint.is_some());
}

#[test]
fn what_others_hold_or_mean_is_passed_over() {
    let mut ledger = Ledger::new(IdRange { start: 0x7ffe_0000, count: 3 * DEFAULT_IDS }, None);
    ledger.set_aside(Foreign { ids: vec![IdRange { start: 0x7fff_ffff, count: 1 }], slot: Some(0) });
    let refused_or = |ledger: &Ledger| ledger.register(&request("a", 1), ALL);
    let got = refused_or(&ledger).unwrap();
    assert_eq!((got.record.id_map.root_uid(), got.record.slot), (0x8000_0000, 1));
}

#[test]
fn joiners_of_a_network_namespace_share_ids_but_not_slots() {
    let mut ledger = ledger();
    let owner = add(&mut ledger, &request("owner", 10));
    let join = Register { netns: netns(5), ..request("joiner", 11) };
    assert_eq!(ledger.register(&join, ALL).unwrap().share_with, None, "the owner has no init yet");
    start(&mut ledger, "owner", 20, netns(5));
    let joined = add(&mut ledger, &join);
    assert_eq!(
        (joined.share_with, joined.record.id_map.clone()),
        (Some(process(20)), owner.record.id_map.clone())
    );
    assert_ne!(joined.record.slot, owner.record.slot);
    // The owner comes back while the joiner still runs with its ids: it must not get them.
    ledger.remove(&key("owner"));
    assert_ne!(base(&add(&mut ledger, &request("owner", 12))), base(&owner));
}

#[test]
fn who_joins_a_namespace_of_another_container_shares_its_ids_until_that_one_ends() {
    let users = Some(FileId { dev: 4, ino: 70 });
    let mut ledger = ledger();
    let owner = add(&mut ledger, &request("owner", 10));
    let init = Common { netns: netns(5), users };
    let started = ledger.started(&key("owner"), process(20), init, ALL).unwrap();
    ledger.commit(started);
    // Of its own network, as with `docker run --pid container:owner`.
    let join = Register { users, ..request("joiner", 11) };
    let joined = add(&mut ledger, &join);
    assert_eq!((joined.share_with, base(&joined)), (Some(process(20)), base(&owner)));
    let init = Common { netns: netns(6), users };
    let started = ledger.started(&key("joiner"), process(21), init, ALL).unwrap();
    ledger.commit(started);
    let stranger = Register { users: Some(FileId { dev: 4, ino: 71 }), ..request("stranger", 12) };
    assert_eq!(ledger.register(&stranger, ALL).unwrap().share_with, None);
    // The owner comes back in a user namespace of its own, while the joiner runs with those ids.
    ledger.commit(Record { phase: Phase::Stopped, ..ledger.get(&key("owner")).unwrap().clone() });
    assert_ne!(base(&ledger.register(&request("owner", 13), ALL).unwrap()), base(&owner));
}

/// Found by the property below: ids that a joiner was given, its runtime's death, and a late word from it.
#[test]
fn a_late_start_does_not_take_ids_that_their_owner_has_taken_back() {
    let mut ledger = ledger();
    add(&mut ledger, &request("owner", 10));
    start(&mut ledger, "owner", 20, netns(5));
    add(&mut ledger, &Register { netns: netns(5), ..request("joiner", 11) });
    // Both the owner's init and the joiner's runtime die; the owner comes back.
    let again = ledger.register(&request("owner", 12), &|p| p.pid == 12).unwrap();
    ledger.commit(again.record);
    let late = ledger
        .started(&key("joiner"), process(21), Common { netns: netns(5), users: None }, &|p| p.pid == 12);
    assert_eq!(late.unwrap_err().kind, RefusalKind::NotFound);
}

#[test]
fn the_hosts_network_namespace_makes_nobody_share() {
    let mut ledger = ledger();
    let host = |id| Register { netns: netns(1), ..request(id, 10) };
    let one = add(&mut ledger, &host("a"));
    start(&mut ledger, "a", 20, netns(1));
    let two = add(&mut ledger, &host("b"));
    assert_eq!(two.share_with, None);
    assert_ne!(base(&one), base(&two));
}

#[test]
fn a_map_in_the_spec_is_honoured_and_a_clash_with_our_ids_told() {
    let map = |start| IdMap::of_range(IdRange { start, count: DEFAULT_IDS });
    let mut ledger = ledger();
    for (start, warned) in [(300_000, false), (POOL.start, true)] {
        let got = ledger.register(&Register { id_map: map(start), ..request("a", 1) }, ALL).unwrap();
        assert_eq!((got.record.id_map, got.record.allocated), (map(start).unwrap(), false));
        assert_eq!(!got.warnings.is_empty(), warned);
    }
    add(&mut ledger, &Register { id_map: map(POOL.start), ..request("a", 1) });
    assert_eq!(base(&add(&mut ledger, &request("b", 2))), 1, "taken is taken");
}

#[test]
fn a_claim_is_for_one_running_container() {
    let claim = Claim {
        data_root: "/var/lib/docker".into(),
        source: "/srv/cache".into(),
        lineage: vec![Ancestor { id: FileId { dev: 1, ino: 2 }, below: "".into() }],
    };
    let claiming = |id| Register { claims: vec![claim.clone()], ..request(id, 10) };
    let mut ledger = ledger();
    add(&mut ledger, &claiming("a"));
    let refused = ledger.register(&claiming("b"), ALL).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Busy);
    assert_eq!(
        refused.message,
        "directory `/srv/cache` on /var/lib/docker of container `b`: it is in use by running container `a`"
    );
    ledger.register(&claiming("b"), NONE).unwrap();
    ledger.register(&claiming("a"), NONE).unwrap();
}

#[test]
fn two_containers_on_one_rootfs_directory_are_told_of_each_other() {
    let on = |id, path: &str| Register { rootfs: Rootfs::Directory { path: path.into() }, ..request(id, 10) };
    let mut ledger = ledger();
    add(&mut ledger, &on("a", "/srv/one"));
    let same = |id, path, alive| ledger.register(&on(id, path), alive).unwrap().same_rootfs;
    assert_eq!(same("b", "/srv/one", ALL), Some(key("a")));
    assert_eq!(same("b", "/srv/two", ALL), None);
    assert_eq!(same("b", "/srv/one", NONE), None);
    assert_eq!(same("a", "/srv/one", NONE), None);
}

#[test]
fn relative_paths_are_refused() {
    let refused = ledger().register(&Register { bundle: "b".into(), ..request("a", 1) }, ALL).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Malformed);
}

#[test]
fn only_the_registered_start() {
    let mut ledger = ledger();
    let kind = |ledger: &Ledger, init, alive| {
        ledger.started(&key("a"), process(init), Common::default(), alive).map_err(|r| r.kind)
    };
    assert_eq!(kind(&ledger, 5, ALL), Err(RefusalKind::NotFound));
    add(&mut ledger, &request("a", 1));
    start(&mut ledger, "a", 5, None);
    assert!(kind(&ledger, 5, ALL).is_ok(), "repeated");
    assert_eq!(kind(&ledger, 6, ALL), Err(RefusalKind::Exists));
    assert_eq!(kind(&ledger, 6, NONE), Err(RefusalKind::NotFound));
}

#[test]
fn a_record_lives_as_long_as_what_it_stands_for() {
    use Fate::{Keep, Remove, Stop};
    use Layer::{Gone, Present, Unknown};
    let (creating, running) = (Phase::Creating { runtime: process(1) }, Phase::Running { init: process(1) });
    let directory = Rootfs::Directory { path: "/r".into() };
    let table: &[(&Rootfs, Phase, bool, Layer, bool, Fate)] = &[
        (&overlay("x"), creating, true, Present, false, Keep),
        (&overlay("x"), creating, false, Present, false, Stop),
        (&overlay("x"), creating, false, Gone, false, Remove),
        (&overlay("x"), creating, false, Unknown, false, Stop),
        (&overlay("x"), running, true, Gone, true, Keep),
        (&overlay("x"), running, false, Gone, true, Remove),
        (&overlay("x"), running, false, Unknown, true, Keep),
        (&overlay("x"), running, false, Present, true, Keep),
        (&overlay("x"), Phase::Stopped, false, Present, false, Keep),
        (&overlay("x"), Phase::Stopped, false, Unknown, false, Keep),
        (&overlay("x"), Phase::Stopped, false, Gone, false, Remove),
        (&directory, creating, true, Unknown, false, Keep),
        (&directory, creating, false, Unknown, false, Remove),
        (&directory, running, true, Unknown, false, Keep),
        (&directory, running, false, Unknown, true, Keep),
        (&directory, running, false, Unknown, false, Remove),
        (&directory, Phase::Stopped, false, Unknown, true, Keep),
        (&directory, Phase::Stopped, false, Unknown, false, Remove),
    ];
    let template = ledger().register(&request("x", 1), ALL).unwrap().record;
    for (rootfs, phase, alive, layer, state, expected) in table {
        let record = Record { rootfs: (*rootfs).clone(), phase: *phase, ..template.clone() };
        let seen = Seen { alive: *alive, layer: *layer, state: *state };
        assert_eq!(fate(&record, seen), *expected, "{phase:?} {seen:?}");
    }
}

#[test]
fn release_waits_for_the_process_and_keeps_what_has_a_layer() {
    let mut ledger = ledger();
    let seen = |alive, layer| Seen { alive, layer, state: true };
    assert_eq!(ledger.release(&key("a"), seen(false, Layer::Present)), Release::Unknown);
    add(&mut ledger, &request("a", 1));
    start(&mut ledger, "a", 5, None);
    assert_eq!(ledger.release(&key("a"), seen(true, Layer::Present)), Release::WhenEnded);
    assert_eq!(ledger.release(&key("a"), seen(false, Layer::Present)), Release::Now(Fate::Stop));
    assert_eq!(ledger.release(&key("a"), seen(false, Layer::Gone)), Release::Now(Fate::Remove));
    add(&mut ledger, &Register { rootfs: Rootfs::Directory { path: "/r".into() }, ..request("d", 1) });
    assert_eq!(ledger.release(&key("d"), seen(false, Layer::Unknown)), Release::Now(Fate::Remove));
}

/// One thing that happens to one of a few containers.
#[derive(Debug, Clone)]
enum Step {
    Register { who: usize, joins: Option<usize>, directory: bool },
    Started { who: usize },
    Dies { who: usize },
    Release { who: usize },
    LayerGone { who: usize },
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let who = 0..6usize;
    let step = prop_oneof![
        4 => (who.clone(), proptest::option::of(0..6usize), any::<bool>())
            .prop_map(|(who, joins, directory)| Step::Register { who, joins, directory }),
        4 => who.clone().prop_map(|who| Step::Started { who }),
        2 => who.clone().prop_map(|who| Step::Dies { who }),
        2 => who.clone().prop_map(|who| Step::Release { who }),
        1 => who.prop_map(|who| Step::LayerGone { who }),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..80)
}

/// The host as the model has it: living processes, and the network namespaces of each name's last life.
#[derive(Default)]
struct Host {
    living: BTreeSet<i32>,
    next: i32,
    netns: BTreeMap<usize, FileId>,
}

impl Host {
    fn spawn(&mut self) -> Process {
        self.next += 1;
        self.living.insert(self.next);
        process(self.next)
    }
}

fn check_invariants(ledger: &Ledger, host: &Host) {
    let alive = |p: Process| host.living.contains(&p.pid);
    let records: Vec<&Record> = ledger.records().collect();
    for (at, a) in records.iter().enumerate() {
        for b in &records[..at] {
            assert_ne!(a.slot, b.slot, "{} and {} share a slot", a.key, b.key);
            if overlap(&a.id_map, &b.id_map) {
                assert_eq!(a.id_map, b.id_map);
                let both_live = is_live(a, &alive) && is_live(b, &alive);
                assert!(!both_live || (a.netns.is_some() && a.netns == b.netns), "{a:?}\n{b:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn ranges_of_the_living_never_overlap_unless_they_share_a_network(steps in steps()) {
        let mut ledger = ledger();
        let host = RefCell::new(Host::default());
        let alive = |p: Process| host.borrow().living.contains(&p.pid);
        let name = |who: usize| format!("c{who}");
        for step in steps {
            match step {
                Step::Register { who, joins, directory } => {
                    let runtime = host.borrow_mut().spawn();
                    let netns = joins.and_then(|other| host.borrow().netns.get(&other).copied());
                    let rootfs = if directory { Rootfs::Directory { path: "/r".into() } } else { overlay(&name(who)) };
                    let request = Register { netns, rootfs, ..request(&name(who), runtime.pid) };
                    if let Ok(got) = ledger.register(&request, &alive) {
                        ledger.commit(got.record);
                    }
                }
                Step::Started { who } => {
                    let init = host.borrow_mut().spawn();
                    let own = FileId { dev: 4, ino: 1000 + u64::try_from(init.pid).unwrap() };
                    if let Ok(record) = ledger.started(&key(&name(who)), init, Common { netns: Some(own), users: None }, &alive) {
                        host.borrow_mut().netns.insert(who, record.netns.unwrap());
                        ledger.commit(record);
                    }
                }
                Step::Dies { who } => {
                    if let Some(process) = ledger.get(&key(&name(who))).and_then(process_of) {
                        host.borrow_mut().living.remove(&process.pid);
                    }
                }
                Step::Release { who } | Step::LayerGone { who } => {
                    let Some(record) = ledger.get(&key(&name(who))).cloned() else { continue };
                    let gone = matches!(step, Step::LayerGone { .. });
                    let alive = is_live(&record, &alive);
                    let seen = Seen { alive, layer: if gone { Layer::Gone } else { Layer::Present }, state: false };
                    let decided = if gone { Release::Now(fate(&record, seen)) } else { ledger.release(&record.key, seen) };
                    apply(&mut ledger, record, decided);
                }
                Step::Restart => {
                    let mut fresh = self::ledger();
                    for record in ledger.records().cloned() {
                        let seen = Seen { alive: is_live(&record, &alive), layer: Layer::Present, state: true };
                        let decided = Release::Now(fate(&record, seen));
                        fresh.commit(record.clone());
                        apply(&mut fresh, record, decided);
                    }
                    ledger = fresh;
                }
            }
            check_invariants(&ledger, &host.borrow());
        }
    }
}

fn apply(ledger: &mut Ledger, record: Record, decided: Release) {
    match decided {
        Release::Now(Fate::Remove) => drop(ledger.remove(&record.key)),
        Release::Now(Fate::Stop) => ledger.commit(Record { phase: Phase::Stopped, ..record }),
        Release::Now(Fate::Keep) | Release::Unknown | Release::WhenEnded => {}
    }
}
