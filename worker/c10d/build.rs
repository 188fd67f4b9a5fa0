//! Compiles the shim, and beside it the NCCL library that the shim opens on demand.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

#[path = "../torch-ext/build_cuda.rs"]
mod build_cuda;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-changed=../torch-ext/build_cuda.rs");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
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
    let mut nccl = compiler(&include);
    nccl.define("USE_C10D_NCCL", None);
    build_cuda::build(nccl, &lib, "shim/nccl_library.cpp", &["nccl.h"], &out.join("libpotstill_nccl.so"))?;
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
