#!/usr/bin/env bash
# Installs, builds, and distills the digits teacher into a one-step generator on two local workers.
#
# Arguments after `--` are passed to `potstill launch`, as in: scripts/quickstart.sh -- --set distillation.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "${1:-}" = -- ] && shift

scripts/setup.sh
exec target/debug/potstill launch configs/digits/one-step.toml --workers 2 "$@"
