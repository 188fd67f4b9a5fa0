//! SHA-256 of files on this machine.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::pieces;

/// SHA-256 of a file, or of a folder's files, hexadecimal. Of a folder the names and contents of `.json`, `.txt` and
/// `.safetensors` files in it and in its sub-folders count, in the order of their paths; hidden files are left out.
///
/// # Errors
/// A file or folder cannot be read.
pub fn sha256_of(path: &Path) -> io::Result<String> {
    let mut hasher = Sha256::new();
    if path.is_dir() {
        let mut files = Vec::new();
        collect(path, Path::new(""), &mut files)?;
        files.sort();
        for file in files {
            let name = file.to_string_lossy();
            hasher.update((name.len() as u64).to_le_bytes());
            hasher.update(name.as_bytes());
            hasher.update(std::fs::metadata(path.join(&file))?.len().to_le_bytes());
            add(&mut hasher, &path.join(&file))?;
        }
    } else {
        add(&mut hasher, path)?;
    }
    Ok(hexadecimal(&hasher.finalize()))
}

/// [`sha256_of`] a file or folder to which others are added. With additions it is the SHA-256 of lines, one for each: its
/// SHA-256, a space, and what is said of it.
///
/// # Errors
/// A file or folder cannot be read.
pub fn sha256_with(path: &Path, additions: &[(PathBuf, String)]) -> io::Result<String> {
    let first = sha256_of(path)?;
    if additions.is_empty() {
        return Ok(first);
    }
    let mut hasher = Sha256::new();
    hasher.update(format!("{first} \n"));
    for (path, said) in additions {
        let digest = sha256_of(path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        hasher.update(format!("{digest} {said}\n"));
    }
    Ok(hexadecimal(&hasher.finalize()))
}

/// Bytes in hexadecimal.
#[must_use]
pub fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn add(hasher: &mut Sha256, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => hasher.update(&buffer[..n]),
        }
        pieces::count();
    }
}

fn collect(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let path = below.join(&name);
        // The caches of model hubs consist of links: their targets are hashed.
        if root.join(&path).is_dir() {
            collect(root, &path, files)?;
        } else if path.extension().is_some_and(|e| e == "json" || e == "txt" || e == "safetensors") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_its_files_names_and_contents() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        };
        write("model_index.json", "{}");
        write("unet/a.safetensors", "weights");
        let first = sha256_of(folder.path()).unwrap();
        write("readme.md", "does not count");
        write(".cache/x.json", "does not count either");
        assert_eq!(sha256_of(folder.path()).unwrap(), first);
        write("unet/a.safetensors", "others.");
        assert_ne!(sha256_of(folder.path()).unwrap(), first);
        write("unet/a.safetensors", "weights");
        std::fs::rename(folder.path().join("unet"), folder.path().join("vae")).unwrap();
        assert_ne!(sha256_of(folder.path()).unwrap(), first);
        // "abc", FIPS 180-2's example.
        write("abc", "abc");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_of(&folder.path().join("abc")).unwrap(), expected);
    }

    #[test]
    fn what_is_added_counts_with_what_is_said_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let [base, added] = ["base", "added"].map(|name| folder.path().join(name));
        std::fs::write(&base, "abc").unwrap();
        std::fs::write(&added, "x").unwrap();
        let with = |said: &str| sha256_with(&base, &[(added.clone(), said.to_owned())]);
        assert_eq!(sha256_with(&base, &[]).unwrap(), sha256_of(&base).unwrap());
        let one = with("1").unwrap();
        assert_ne!(one, with("0.5").unwrap());
        let lines = format!("{} \n{} 1\n", sha256_of(&base).unwrap(), sha256_of(&added).unwrap());
        assert_eq!(one, hexadecimal(&Sha256::digest(lines)));
        std::fs::remove_file(&added).unwrap();
        assert!(with("1").unwrap_err().to_string().contains("added"));
    }
}
