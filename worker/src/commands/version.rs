//! The program's version.

use std::sync::LazyLock;

/// With the commit that a release was built from (`POTSTILL_COMMIT` in the build's environment), and the versions of libtorch and
/// of the CUDA and NCCL that it was built for.
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    let commit = option_env!("POTSTILL_COMMIT").unwrap_or("no release");
    let (torch, cuda, nccl) =
        (env!("POTSTILL_TORCH_VERSION"), env!("POTSTILL_CUDA_VERSION"), env!("POTSTILL_NCCL_VERSION"));
    format!("{} ({commit}), libtorch {torch}, CUDA {cuda}, NCCL {nccl}", env!("CARGO_PKG_VERSION"))
});
