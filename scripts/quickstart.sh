#!/usr/bin/env bash
# Installs, builds, and distills the digits teacher into a one-step generator on two local workers.
#
# Arguments after `--` are passed to `potstill launch`, as in: scripts/quickstart.sh -- --set distillation.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1:-}" = -- ] && shift

scripts/setup.sh
echo "Building the two programs; the first time takes several minutes on 2 cores …"
cargo build -p potstill-cli -p potstill-worker --bins
exec target/debug/potstill launch configs/digits/one-step.toml --workers 2 "$@"
