#!/usr/bin/env bash
# Measures on this machine how long a run takes to continue after a rank was killed, the cost of checkpoints of a large
# state, and how long a generation takes to form. About 20 minutes on 2 idle CPU cores, after the build.
#
#   scripts/bench_recovery.sh                  everything
#   scripts/bench_recovery.sh --only kill      only one measurement: kill, checkpoint or form
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" >&2
cargo build --manifest-path "$root/Cargo.toml" --quiet -p potstill-coordinator --example form_generation
exec "$root/.venv/bin/python" "$root/scripts/bench_recovery.py" "$@"
