//! Compiles the shim, and tells `potstill-c10d` where its headers are.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};

mod build_cuda;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build_cuda.rs");
    println!("cargo::rerun-if-changed=shim");
    for name in ["LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // Exported by torch-sys, which handles all the ways in which libtorch can be found.
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB")?);
    let root = env::var_os("LIBTORCH_INCLUDE")
        .map(PathBuf::from)
        .or_else(|| lib.parent().map(Path::to_path_buf))
        .ok_or("libtorch's include folder is not known")?;
    let include = root.join("include");
    compiler(&include).file("shim/torch_ext.cpp").compile("potstill_torch_ext");
    // Empty where CUDA's headers are missing: graphs then return an error.
    let cuda = PathBuf::from(env::var("OUT_DIR")?).join("libpotstill_cuda.so");
    build_cuda::build(compiler(&include), &lib, "shim/cuda_library.cpp", &[], &cuda)?;
    println!("cargo::metadata=include={}/shim", env::var("CARGO_MANIFEST_DIR")?);
    println!("cargo::rustc-link-search=native={}", lib.display());
    println!("cargo::rustc-link-lib=torch_cpu");
    println!("cargo::rustc-link-lib=c10");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
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
        .include(include)
        .include(include.join("torch/csrc/api/include"));
    build
}
