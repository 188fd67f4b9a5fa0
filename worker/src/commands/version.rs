//! The program's version.

use std::sync::LazyLock;

/// With the commit that a release was built from (`POTSTILL_COMMIT` in the build's environment), and libtorch's version.
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    let commit = option_env!("POTSTILL_COMMIT").unwrap_or("no release");
    format!("{} ({commit}), libtorch {}", env!("CARGO_PKG_VERSION"), env!("POTSTILL_TORCH_VERSION"))
});
