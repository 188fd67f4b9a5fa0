#!/usr/bin/env bash
# Installs, builds and runs every test. Arguments are passed to `cargo test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
if ! cmp -s requirements-test.txt .venv/installed-requirements-test.txt; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
    cp requirements-test.txt .venv/installed-requirements-test.txt
fi
# A server of Azure's storage, in Node. Without it the tests that need it are skipped by name.
azurite=azurite@3.35.0 # The newest that runs on Node before 21.
if command -v npm >/dev/null && ! grep -qsxF "$azurite" .venv/installed-azurite.txt; then
    if npm install --silent --no-audit --no-fund --prefix .venv/azurite "$azurite"; then
        echo "$azurite" >.venv/installed-azurite.txt
    else
        echo "$azurite could not be installed; the tests of Azure's storage will be skipped" >&2
    fi
fi
.venv/bin/python scripts/train_features.py --check
.venv/bin/python -m unittest discover -s scripts/tests
# Test programs run one after the other; within one, two tests at a time: each test of a cluster has two ranks.
# One thread for libtorch: with other processes on the same cores, threads that wait by spinning are many times slower.
export OMP_NUM_THREADS=1
cargo test --workspace --quiet "$@" -- --test-threads=2
