#!/usr/bin/env bash
# Checks Potstill on this machine's GPU: an NCCL group, the digits on the GPU and on the CPU, and a full SiD iteration
# of a network of SDXL's size at 1024×1024 in Potstill and in eager PyTorch and diffusers. About 8 minutes on one GPU
# with 80 GB.
#
#   scripts/gpu_check.sh                 prints the results as Markdown
#   scripts/gpu_check.sh --rehearse      the same steps on the CPU with a tiny network, as a test of this script
#
# Without a GPU it reports that and exits with 0. Without Rust it uses the programs in target/debug; PYTHON names a
# Python with torch, diffusers and safetensors, by default the one of .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${1:-}" != --rehearse ] && [ ! -e /dev/nvidiactl ]; then
    echo "gpu_check: this machine has no CUDA device; nothing was checked"
    exit 0
fi
python=${PYTHON:-$root/.venv/bin/python}
if command -v cargo >/dev/null; then
    "$root/scripts/setup.sh" >&2
    cargo build --manifest-path "$root/Cargo.toml" --quiet -p potstill-distill --example iteration
fi
exec "$python" "$root/scripts/gpu_check.py" "$@"
