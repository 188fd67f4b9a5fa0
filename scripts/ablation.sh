#!/usr/bin/env bash
# Runs the ablation on the digits and writes docs/RESULTS.md with its table and pictures: one and four steps, with and
# without guidance, data-free and with the adversarial loss. About 100 minutes on 2 idle CPU cores, after the build.
#
#   scripts/ablation.sh                     all of it; what is done already is not done again
#   scripts/ablation.sh --storage FOLDER    where the runs are kept (default: ablation/)
#   scripts/ablation.sh --only four         only the runs whose names contain this
#   scripts/ablation.sh --report            only write the document anew from the runs that are there
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" >&2
exec "$root/.venv/bin/python" "$root/scripts/ablation.py" "$@"
