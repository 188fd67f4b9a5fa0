//! Compiles the shim, and beside it the NCCL library that the shim opens on demand.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Headers that the NCCL library needs beyond libtorch's own, each from a package of its own.
const NCCL_HEADERS: [&str; 4] = ["nccl.h", "cuda_runtime_api.h", "crt/host_defines.h", "nv/target"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Exported by torch-sys, which handles all the ways in which libtorch can be found.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB")?);
    let root = env::var_os("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .or_else(|| lib.parent().map(Path::to_path_buf))
        .ok_or("libtorch's include folder is not known")?;
    let include = root.join("include");

    compiler(&include).define("USE_C10D_GLOO", None).file("shim/shim.cpp").compile("potstill_c10d");

    println!("cargo::rustc-link-search=native={}", lib.display());
    println!("cargo::rustc-link-lib=torch_cpu");
    println!("cargo::rustc-link-lib=c10");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());

    // Empty where NCCL's headers are missing: NCCL's functions then return an error.
    let nccl = out.join("libpotstill_nccl.so");
    match nccl_includes(&lib) {
        Some(includes) => build_nccl(&include, &includes, &lib, &nccl)?,
        None => fs::write(&nccl, [])?,
    }
    Ok(())
}

fn compiler(include: &Path) -> cc::Build {
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .opt_level(2)
        .debug(false)
        .warnings(false)
        .flag("-fvisibility=hidden")
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .include("shim")
        // Headers that both shims share.
        .include(env::var_os("DEP_POTSTILL_TORCH_EXT_INCLUDE").unwrap_or_default())
        .include(include)
        .include(include.join("torch/csrc/api/include"));
    build
}

/// The folders that together hold `NCCL_HEADERS`, in torch's sibling packages or in a CUDA toolkit; `None`
/// when one is missing or libtorch is a build without CUDA.
fn nccl_includes(lib: &Path) -> Option<Vec<PathBuf>> {
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
    let found = |header: &str| folders.iter().any(|folder| folder.join(header).exists());
    NCCL_HEADERS.iter().all(|header| found(header)).then_some(folders)
}

fn build_nccl(include: &Path, nvidia: &[PathBuf], lib: &Path, library: &Path) -> Result<(), Box<dyn Error>> {
    let mut build = compiler(include);
    build.includes(nvidia).define("USE_C10D_NCCL", None).file("shim/nccl_library.cpp");
    let objects = build.compile_intermediates();
    let status = Command::new(build.get_compiler().path())
        .args(["-shared", "-s", "-o"])
        .arg(library)
        .args(objects)
        .arg("-L")
        .arg(lib)
        .args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"])
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("linking {}: {status}", library.display()).into()) }
}
