//! Puts libtorch's folder into the rpath, so that what is built here runs in any shell, and its version into the program.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let folder = std::env::var("DEP_TCH_LIBTORCH_LIB").ok();
    if let Some(folder) = &folder {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{folder}");
    }
    let torch = folder.and_then(|folder| Path::new(&folder).parent()?.canonicalize().ok());
    let version = |name| torch.as_deref().and_then(|torch| stated(torch, name));
    for (variable, version, without) in [
        ("POTSTILL_TORCH_VERSION", version("__version__"), "of unknown version"),
        ("POTSTILL_CUDA_VERSION", version("cuda"), "none"),
        ("POTSTILL_NCCL_VERSION", torch.as_deref().and_then(nccl_version), "none"),
    ] {
        println!("cargo::rustc-env={variable}={}", version.as_deref().unwrap_or(without));
    }
}

/// From the file in which PyTorch's wheel states its versions, as in `__version__ = '2.11.0+cu130'`, `cuda: Optional[str] = '13.0'`.
fn stated(torch: &Path, name: &str) -> Option<String> {
    let file = torch.join("version.py");
    println!("cargo::rerun-if-changed={}", file.display());
    let text = std::fs::read_to_string(file).ok()?;
    let line =
        text.lines().find(|line| line.split([':', ' ', '=']).next() == Some(name) && line.contains('='))?;
    line.split(['\'', '"']).nth(1).map(str::to_owned)
}

/// Of the wheel that PyTorch's requires, from its folder of metadata beside it: `nvidia_nccl_cu13-2.28.9.dist-info`.
fn nccl_version(torch: &Path) -> Option<String> {
    let beside = std::fs::read_dir(torch.parent()?).ok()?.flatten();
    beside.filter_map(|entry| entry.file_name().into_string().ok()).find_map(|name| {
        let version = name.strip_prefix("nvidia_nccl_")?.strip_suffix(".dist-info")?;
        version.split_once('-').map(|(_, version)| version.to_owned())
    })
}
