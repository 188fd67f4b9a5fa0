//! Files that come into being whole, and only where there is none: by a hard link, or on file systems without hard links by a rename
//! that replaces nothing.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use object_store::Error as StoreError;
use uuid::Uuid;

/// Whether an error of a write that replaces nothing means that the file system has no hard links: with one it publishes what it has
/// written and synced beside.
pub(crate) fn lacks_links(error: &StoreError) -> bool {
    let is_publishing = error.to_string().contains("Unable to rename file");
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return is_without_links(io) && is_publishing;
        }
        cause = error.source();
    }
    false
}

/// Permissions of a file that others may read, as far as the process's mask lets them.
pub(crate) const SHARED: u32 = 0o666;
/// Permissions of a file for this user alone.
pub(crate) const SECRET: u32 = 0o600;

/// Writes a file that must not exist, with these permissions, and syncs it and its folder to disk.
///
/// # Errors
/// [`StoreError::AlreadyExists`]; [`StoreError::NotSupported`] where the file system has neither hard links nor a rename that replaces
/// nothing.
pub(crate) fn create(path: &Path, bytes: &[u8], permissions: u32) -> Result<(), StoreError> {
    let place = || path.display().to_string();
    let failed = |source: io::Error| StoreError::Generic { store: "LocalFileSystem", source: source.into() };
    let folder = path.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(folder).map_err(failed)?;
    // Names with this ending are passed over when the store is listed.
    let staged = path.with_file_name(format!(
        "{}#{}",
        path.file_name().unwrap_or_default().to_string_lossy(),
        Uuid::new_v4().as_u128() >> 64
    ));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(permissions)
        .open(&staged)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| publish(&staged, path));
    // After a rename it is not there.
    let _ = std::fs::remove_file(&staged);
    match written {
        Ok(()) => File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed),
        Err(source) if source.kind() == ErrorKind::AlreadyExists => {
            Err(StoreError::AlreadyExists { path: place(), source: source.into() })
        }
        Err(source) if matches!(source.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => {
            let problem = format!(
                "the file system of {} has neither hard links nor a rename that replaces nothing, so two coordinators could not be \
                 told apart there: use a folder on another one ({source})",
                folder.display()
            );
            Err(StoreError::NotSupported { source: problem.into() })
        }
        Err(source) => Err(failed(source)),
    }
}

/// Gives a file its name, where no file has it. The file's former name may stay.
fn publish(staged: &Path, path: &Path) -> io::Result<()> {
    match std::fs::hard_link(staged, path) {
        Err(error) if is_without_links(&error) => rename_new(staged, path),
        other => other,
    }
}

/// EPERM, ENOSYS, ENOTSUP: file systems differ in how they say that they have no hard links.
fn is_without_links(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported)
}

#[cfg(target_os = "linux")]
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?)
}

#[cfg(not(target_os = "linux"))]
fn rename_new(_from: &Path, _to: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_who_create_the_same_at_once_one_wins_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal/1.json");
        let results: Vec<_> = std::thread::scope(|scope| {
            let one = |n: u8| {
                let path = &path;
                scope.spawn(move || create(path, &[n; 4096], SHARED))
            };
            (0..16u8).map(one).collect::<Vec<_>>().into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        let lost = results.iter().filter_map(|result| result.as_ref().err());
        assert!(lost.into_iter().all(|error| matches!(error, StoreError::AlreadyExists { .. })));
        let content = std::fs::read(&path).unwrap();
        assert!(content.len() == 4096 && content.iter().all(|byte| *byte == content[0]));
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
