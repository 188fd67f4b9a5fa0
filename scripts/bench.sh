#!/usr/bin/env bash
# Measures Potstill on this machine and prints one table: distillation with one and with two workers, where a step's
# time goes, how long a start takes, peak memory, and Gloo's all-reduce. A few minutes on 2 CPU cores.
#
#   scripts/bench.sh                                 the table
#   scripts/bench.sh --json FILE                     and the same as JSON, with every round
#   scripts/bench.sh --rounds 1 --iterations 20      a short look
#
# Times depend on the machine and on what else it does: compare only numbers of one table, best its ratios.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case " $* " in
    *" -h "* | *" --help "*) exec "${PYTHON:-python3}" scripts/bench.py --help ;;
esac

# Standard output is for the table.
scripts/setup.sh >&2

# --json is relative to here, the repository's root, as all paths of the other scripts are.
.venv/bin/python scripts/bench.py "$@" &
bench=$!
trap 'kill -TERM "$bench" 2>/dev/null || true' INT TERM HUP
# A signal ends the first wait early; the second one lets the measurement clean up behind itself.
status=0
wait "$bench" || status=$?
if kill -0 "$bench" 2>/dev/null; then
    wait "$bench" || status=$?
fi
exit "$status"
