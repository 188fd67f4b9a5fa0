#!/bin/sh
# The image's first stage, in the project's folder of a Debian system that has Rust, as root: builds the wheel in dist/.
set -eu

export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends g++ python3-venv

scripts/setup.sh
cargo build --release --locked -p potstill-cli -p potstill-worker --bins
.venv/bin/pip install --disable-pip-version-check -r scripts/package/requirements.txt
.venv/bin/python scripts/package/wheel.py
