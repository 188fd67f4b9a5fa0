#!/bin/sh
# The image's last stage, in a Debian system, as root: installs the wheel $1 into /opt/potstill, and makes the user and
# the folder of runs.
set -eu
wheel=$1

export DEBIAN_FRONTEND=noninteractive
apt-get update
# The certificates are those by which object stores are trusted.
apt-get install -y --no-install-recommends ca-certificates libstdc++6 python3-venv
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/potstill
/opt/potstill/bin/pip install --disable-pip-version-check --no-cache-dir --no-compile "$wheel"

useradd --uid 1000 --create-home --shell /usr/sbin/nologin potstill
install --directory --owner=potstill --group=potstill /data
