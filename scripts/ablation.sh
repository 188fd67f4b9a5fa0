#!/usr/bin/env bash
# Runs the ablation on the digits and writes docs/RESULTS.md with its table and pictures: one and four steps, with and
# without guidance, data-free and with the adversarial loss. About 100 minutes on 2 idle CPU cores, after the build.
#
#   scripts/ablation.sh                     all runs; finished ones are not repeated
#   scripts/ablation.sh --storage FOLDER    storage of the runs (default: ablation/)
#   scripts/ablation.sh --only four         only the runs whose names contain this
#   scripts/ablation.sh --report            only write the document again from the finished runs
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" >&2
exec "$root/.venv/bin/python" "$root/scripts/ablation.py" "$@"
