//! The environment of processes that compute.

/// Variables, unless they are set already.
///
/// The first two keep glibc from returning memory to the system between two passes over the network, which costs page
/// faults: an eighth of a small network's time. The third keeps c10d's warnings, with their stacks, out of the log,
/// which holds the rank's own lines. The fourth lets OpenMP's threads give up the processor soon where they wait for each
/// other. By default they spin, which beside other busy processes takes more than twice as long, and is not measurably
/// faster where there are none (docs/BENCHMARKS.md).
const VARIABLES: [(&str, &str); 4] = [
    ("MALLOC_TRIM_THRESHOLD_", "1073741824"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("TORCH_CPP_LOG_LEVEL", "ERROR"),
    ("GOMP_SPINCOUNT", "1000"),
];

/// The variables that a process that computes needs beside those that are set.
pub fn of_children() -> impl Iterator<Item = (&'static str, &'static str)> {
    VARIABLES.into_iter().filter(|(name, _)| std::env::var_os(name).is_none())
}

/// The variable by which libtorch's Gloo takes another transport than TCP.
const TRANSPORT: &str = "GLOO_DEVICE_TRANSPORT";

/// Refuses a variable under which ranks would seem to encrypt what they exchange, before there is a rank.
///
/// # Errors
/// It is set.
pub fn check() -> anyhow::Result<()> {
    match std::env::var_os(TRANSPORT) {
        Some(transport) if transport != "TCP" => anyhow::bail!(
            "{TRANSPORT} is {transport:?}, and only TCP is supported: with TCP_TLS this libtorch sends everything in the clear. Unset \
             it, and encrypt the network between the ranks, as with WireGuard or IPsec (SECURITY.md)"
        ),
        _ => Ok(()),
    }
}
