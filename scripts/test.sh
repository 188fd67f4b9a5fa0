#!/usr/bin/env bash
# Installs, builds and runs every test. Arguments are handed to `cargo test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
if ! cmp -s requirements-test.txt .venv/installed-requirements-test.txt; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
    cp requirements-test.txt .venv/installed-requirements-test.txt
fi
.venv/bin/python scripts/train_features.py --check
.venv/bin/python -m unittest discover -s scripts/tests
# Test programs run one after the other; within one, two at a time: each of the cluster's tests has two ranks of its own.
# One thread for libtorch: beside other processes, threads that wait for each other by spinning are many times slower.
export OMP_NUM_THREADS=1
cargo test --workspace --quiet "$@" -- --test-threads=2
