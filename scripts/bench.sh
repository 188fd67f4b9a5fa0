#!/usr/bin/env bash
# Measures Potstill on this machine and prints one table: distillation with one and with two workers, where a step's
# time goes, how long a start takes, peak memory, and Gloo's all-reduce. About 1.5 minutes on 2 CPU cores, after the build.
#
#   scripts/bench.sh                                 the table
#   scripts/bench.sh --json FILE                     also writes it as JSON, with every round
#   scripts/bench.sh --rounds 1 --iterations 20      a short measurement
#
# Times depend on the machine and its other load: compare only numbers of one table, preferably its ratios.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case " $* " in
*" -h "* | *" --help "*) exec "${PYTHON:-python3}" "$root/scripts/bench.py" --help ;;
esac

# Standard output is for the table.
"$root/scripts/setup.sh" >&2

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# In the background, because bash handles a signal only between commands and while it waits. A signal is forwarded, and
# the measurement ends all processes that it has started before it ends itself.
"$root/.venv/bin/python" "$root/scripts/bench.py" --work "$work" "$@" &
measuring=$!
trap 'kill -TERM "$measuring" 2>/dev/null || true' HUP INT TERM
status=0
wait "$measuring" || status=$?
while kill -0 "$measuring" 2>/dev/null; do
    status=0
    wait "$measuring" || status=$?
done
exit "$status"
