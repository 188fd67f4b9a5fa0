//! The flight record: the newest collectives of this rank, written where one hangs, by the rank that hangs and by those that wait.
//!
//! c10d's own watchdog writes none here: collectives have no timeout, because the coordinator finds the rank that hangs.

use std::{ffi::OsString, path::PathBuf, thread, time::Duration};

use potstill_c10d::{ProcessGroup, write_flight_record};
use potstill_logging::chain;
use potstill_proto::cursor::Generation;
use tokio::sync::oneshot;

/// A collective that has waited for longer when its generation is given up has hung. When a peer ends, its connections tell at
/// once.
pub const HANGS: Duration = Duration::from_secs(3);
/// How long the record may take: a device that does not answer may block it.
const WRITING: Duration = Duration::from_secs(5);
/// Variables of libtorch with what stands before the rank in the file's name; the first that is set counts.
const PREFIXES: [&str; 2] = ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"];

/// Writes the record of this rank. Returns where it is, or why there is none, as the end of a sentence.
pub async fn record(group: &ProcessGroup, run: &str, generation: Generation) -> String {
    let prefix = PREFIXES.iter().find_map(std::env::var_os).filter(|prefix| !prefix.is_empty());
    let file = file(prefix, run, generation, group.member().rank);
    let (done, written) = oneshot::channel();
    let (device, path) = (group.device(), file.clone());
    // Not a task of the runtime, which would wait for it at its end.
    thread::spawn(move || done.send(write_flight_record(device, &path)));
    match tokio::time::timeout(WRITING, written).await {
        Ok(Ok(Ok(()))) => format!("its flight record is {}", file.display()),
        Ok(Ok(Err(error))) => format!("it has no flight record: {}", chain(&error.into())),
        Ok(Err(_)) | Err(_) => "it has no flight record: the device does not answer".to_owned(),
    }
}

/// The file of a rank: that of the prefix, or one for each generation in the folder for temporary files.
fn file(prefix: Option<OsString>, run: &str, generation: Generation, rank: usize) -> PathBuf {
    let mut name = prefix.unwrap_or_else(|| {
        std::env::temp_dir().join(format!("potstill-{run}-g{}-rank-", generation.0)).into_os_string()
    });
    name.push(rank.to_string());
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_named_as_libtorch_names_it_or_by_run_and_generation() {
        let named = file(Some("/data/trace_".into()), "run", Generation(3), 2);
        assert_eq!(named, PathBuf::from("/data/trace_2"));
        let own = file(None, "run", Generation(3), 2);
        assert_eq!(own, std::env::temp_dir().join("potstill-run-g3-rank-2"));
    }
}
