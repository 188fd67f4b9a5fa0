//! The cores of this machine's ranks: those near a rank's GPU, and no other rank's.
//!
//! Only ranks with a GPU are bound. On the CPU the kernel's scheduler does better: the ranks' threads are as many as the cores
//! already, a spare's cores would lie idle until it is needed, and the coordinator and the threads that save take from whichever
//! core is free.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// Numbers of cores, as the kernel counts them: hardware threads.
pub type Cores = BTreeSet<usize>;

/// The cores that this process may use: what a cluster's scheduler or a control group leaves it.
///
/// # Errors
/// The kernel does not say.
pub fn allowed() -> io::Result<Cores> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false)).collect())
}

/// Binds this thread, and all that it starts from now on.
///
/// # Errors
/// The kernel refuses.
pub fn bind(cores: &Cores) -> io::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Divides cores between ranks, one for each of `addresses`, the PCI addresses of their devices; `sysfs` is `/sys`.
///
/// A rank gets cores of the NUMA node of its device, if any of them is `allowed`, else any. Ranks that would have the same ones get
/// equal parts, in which the hardware threads of a core stay together. Where there are more ranks than cores they share them.
pub fn divided(sysfs: &Path, allowed: &Cores, addresses: &[Option<String>]) -> Vec<Cores> {
    let near = |address: &Option<String>| {
        let file = format!("bus/pci/devices/{}/local_cpulist", address.as_deref()?);
        let near: Cores =
            list(&fs::read_to_string(sysfs.join(file)).ok()?)?.intersection(allowed).copied().collect();
        (!near.is_empty()).then_some(near)
    };
    let mut groups: BTreeMap<Cores, Vec<usize>> = BTreeMap::new();
    for (rank, address) in addresses.iter().enumerate() {
        groups.entry(near(address).unwrap_or_else(|| allowed.clone())).or_default().push(rank);
    }
    // Those with the least choice first: a rank whose node is not known takes what the others leave.
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(cores, _)| cores.len());
    let mut taken = Cores::new();
    let mut divided = vec![Cores::new(); addresses.len()];
    for (near, ranks) in groups {
        let free: Cores = near.difference(&taken).copied().collect();
        let whole = physical(sysfs, &free);
        for (place, rank) in ranks.iter().enumerate() {
            let part = |bound: usize| bound * whole.len() / ranks.len();
            divided[*rank] = match whole.len() < ranks.len() {
                true => near.clone(),
                false => whole[part(place)..part(place + 1)].concat().into_iter().collect(),
            };
        }
        taken.extend(&near);
    }
    divided
}

/// The cores as groups of hardware threads that share one.
fn physical(sysfs: &Path, cores: &Cores) -> Vec<Vec<usize>> {
    let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for core in cores {
        let file = sysfs.join(format!("devices/system/cpu/cpu{core}/topology/thread_siblings_list"));
        let siblings = fs::read_to_string(file).ok().and_then(|text| list(&text));
        let first = siblings.and_then(|siblings| siblings.first().copied()).unwrap_or(*core);
        groups.entry(first).or_default().push(*core);
    }
    groups.into_values().collect()
}

/// The kernel's lists, as in `0-3,8,10-11`.
fn list(text: &str) -> Option<Cores> {
    let mut cores = Cores::new();
    for range in text.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        // Bounded, whatever the file says.
        cores.extend(first..=last.min(CpuSet::count()));
    }
    Some(cores)
}

/// Numbers as the kernel writes them.
pub fn text(cores: &Cores) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for core in cores {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *core => *last = *core,
            _ => ranges.push((*core, *core)),
        }
    }
    let range = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// A machine of `nodes` NUMA nodes with eight cores each, of two hardware threads, and four devices on each: `0000:N0:00.0` and
    /// on is on node N.
    fn machine(nodes: usize) -> TempDir {
        let sysfs = tempfile::tempdir().unwrap();
        let put = |path: String, content: String| {
            let path = sysfs.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        let cores = nodes * 8;
        for core in 0..2 * cores {
            let first = core % cores;
            let file = format!("devices/system/cpu/cpu{core}/topology/thread_siblings_list");
            put(file, format!("{first},{}\n", first + cores));
        }
        for node in 0..nodes {
            for device in 0..4 {
                let (first, second) = (node * 8, node * 8 + cores);
                let file = format!("bus/pci/devices/0000:{node}{device}:00.0/local_cpulist");
                put(file, format!("{first}-{},{second}-{}\n", first + 7, second + 7));
            }
        }
        sysfs
    }

    fn devices(names: &[&str]) -> Vec<Option<String>> {
        names.iter().map(|name| (!name.is_empty()).then(|| format!("0000:{name}:00.0"))).collect()
    }

    fn texts(divided: &[Cores]) -> Vec<String> {
        divided.iter().map(text).collect()
    }

    #[test]
    fn ranks_get_whole_cores_near_their_devices_and_keep_off_each_other() {
        let sysfs = machine(2);
        let all: Cores = (0..32).collect();
        let divided =
            divided(sysfs.path(), &all, &devices(&["00", "10", "01", "11", "02", "12", "03", "13"]));
        let expected = [
            "0-1,16-17",
            "8-9,24-25",
            "2-3,18-19",
            "10-11,26-27",
            "4-5,20-21",
            "12-13,28-29",
            "6-7,22-23",
            "14-15,30-31",
        ];
        assert_eq!(texts(&divided), expected);
    }

    #[test]
    fn an_affinity_that_is_narrower_is_kept() {
        let sysfs = machine(2);
        // What Slurm gives a task of four cores on the first node, whose devices are on both.
        let allowed: Cores = [0, 1, 2, 3, 16, 17, 18, 19].into();
        let on_the_node = divided(sysfs.path(), &allowed, &devices(&["00", "01"]));
        assert_eq!(texts(&on_the_node), ["0-1,16-17", "2-3,18-19"]);
        // No core of the other node is allowed: any will do, but none that another rank has, while there are some.
        let far = divided(sysfs.path(), &allowed, &devices(&["10", "11"]));
        assert_eq!(texts(&far), ["0-1,16-17", "2-3,18-19"]);
        for cores in on_the_node.iter().chain(&far) {
            assert!(cores.is_subset(&allowed));
        }
    }

    #[test]
    fn more_ranks_than_cores_share_them_and_unknown_devices_take_what_is_left() {
        let sysfs = machine(2);
        let allowed: Cores = [0, 1].into();
        let shared = divided(sysfs.path(), &allowed, &devices(&["00", "01", "02"]));
        assert_eq!(texts(&shared), ["0-1", "0-1", "0-1"]);
        let all: Cores = (0..32).collect();
        // A device that sysfs does not know, and one whose address the driver did not say.
        let unknown = divided(sysfs.path(), &all, &devices(&["00", "ff", ""]));
        assert_eq!(texts(&unknown), ["0-7,16-23", "8-11,24-27", "12-15,28-31"]);
        // A machine without any of these files.
        let bare = tempfile::tempdir().unwrap();
        let plain = divided(bare.path(), &(0..4).collect(), &devices(&["00", "01"]));
        assert_eq!(texts(&plain), ["0-1", "2-3"]);
    }

    #[test]
    fn a_thread_that_is_bound_hands_it_on_to_what_it_starts() {
        let allowed = allowed().unwrap();
        let one: Cores = allowed.first().copied().into_iter().collect();
        let bound = std::thread::spawn({
            let one = one.clone();
            move || {
                bind(&one).unwrap();
                std::process::Command::new("cat").arg("/proc/self/status").output().unwrap()
            }
        });
        let status = String::from_utf8(bound.join().unwrap().stdout).unwrap();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
        assert_eq!(list.trim(), text(&one));
        assert_eq!(super::allowed().unwrap(), allowed, "this thread is not bound");
    }

    #[test]
    fn the_kernels_lists_are_read_and_written() {
        for written in ["0", "0-3,8,10-11", "5,7"] {
            assert_eq!(text(&list(&format!("{written}\n")).unwrap()), written);
        }
        assert_eq!(list("\n"), Some(Cores::new()));
        assert_eq!(list("a-b"), None);
        assert!(list("0-99999999999").unwrap().len() <= CpuSet::count() + 1);
    }
}
