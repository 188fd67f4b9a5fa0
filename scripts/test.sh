#!/usr/bin/env bash
# Installs what the tests need, builds and runs every test. Arguments are handed to `cargo test`.
#
# A test whose server or right is missing fails. POTSTILL_TEST_WITHOUT=slurm,chromium,… names what this machine lacks: tests that need it
# are then left out, and named at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
if ! cmp -s requirements-test.txt .venv/installed-requirements-test.txt; then
    echo "Installing the packages that tests compare with …"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
    cp requirements-test.txt .venv/installed-requirements-test.txt
fi
exec .venv/bin/python scripts/tests/run.py "$@"
