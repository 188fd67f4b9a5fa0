//! Puts libtorch's folder into the rpath, so that what is built here runs in any shell, and its version into the program.

use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let folder = std::env::var("DEP_TCH_LIBTORCH_LIB").ok();
    if let Some(folder) = &folder {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{folder}");
    }
    let version = folder.and_then(|folder| torch_version(Path::new(&folder).parent()?));
    println!(
        "cargo::rustc-env=POTSTILL_TORCH_VERSION={}",
        version.as_deref().unwrap_or("of unknown version")
    );
}

/// From the file in which PyTorch's wheel states it, as in `__version__ = '2.11.0+cu130'`.
fn torch_version(torch: &Path) -> Option<String> {
    let file = torch.join("version.py");
    println!("cargo::rerun-if-changed={}", file.display());
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with("__version__"))?;
    line.split(['\'', '"']).nth(1).map(str::to_owned)
}
