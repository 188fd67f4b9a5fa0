#!/usr/bin/env bash
# Trains on the digits while ranks and the coordinator are killed and paused at random and storage faults are injected,
# and compares the result with an undisturbed run's. Exits with 1 if an iteration was lost, repeated or changed.
#
#   scripts/chaos.sh --minutes 2 --seed 0
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" >&2
exec "$root/.venv/bin/python" "$root/scripts/chaos.py" "$@"
