//! Compiles a library that is linked to libtorch's CUDA half, for the build scripts of both crates with a shim.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Headers of CUDA's runtime, each from a package of its own.
const HEADERS: [&str; 3] = ["cuda_runtime_api.h", "crt/host_defines.h", "nv/target"];

/// Compiles `source`, which needs the headers of CUDA's runtime and `more`, into the file `library`. Where a header is missing, or
/// libtorch is a build without CUDA, the file becomes empty.
///
/// # Errors
/// The compiler's or the linker's.
pub fn build(
    mut compiler: cc::Build,
    lib: &Path,
    source: &str,
    more: &[&str],
    library: &Path,
) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    let Some(includes) = includes(lib, more) else { return Ok(fs::write(library, [])?) };
    let objects = compiler.includes(&includes).file(source).compile_intermediates();
    let status = Command::new(compiler.get_compiler().path())
        .args(["-shared", "-s", "-o"])
        .arg(library)
        .args(objects)
        .arg("-L")
        .arg(lib)
        .args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"])
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("linking {}: {status}", library.display()).into()) }
}

/// The folders that together hold the headers, in torch's sibling packages or in a CUDA toolkit.
fn includes(lib: &Path, more: &[&str]) -> Option<Vec<PathBuf>> {
    if !lib.join("libtorch_cuda.so").exists() {
        return None;
    }
    let mut folders = Vec::new();
    // site-packages/torch/lib is the usual place; `lib` may be reached through a link.
    if let Some(packages) = lib.canonicalize().ok().as_deref().and_then(|lib| lib.ancestors().nth(2)) {
        let nvidia = fs::read_dir(packages.join("nvidia")).into_iter().flatten().flatten();
        for include in nvidia.map(|package| package.path().join("include")) {
            folders.push(include.join("cccl"));
            folders.push(include);
        }
    }
    let toolkit = env::var_os("CUDA_HOME").map_or_else(|| PathBuf::from("/usr/local/cuda"), PathBuf::from);
    folders.push(toolkit.join("include/cccl"));
    folders.push(toolkit.join("include"));
    // Only existing paths: cargo takes a missing path for a changed one, and would build again each time.
    folders.retain(|folder| folder.is_dir());
    for folder in &folders {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    let found = |header: &&str| folders.iter().any(|folder| folder.join(header).exists());
    HEADERS.iter().chain(more).all(found).then_some(folders)
}
