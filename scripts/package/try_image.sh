#!/usr/bin/env bash
# Tries the image's last stage without a container builder: makes a clean Debian with debootstrap, installs a wheel as
# the Dockerfile does, and distills for a few iterations in it, as its user, on two workers. Argument: the wheel.
#
# Takes some minutes and 10 GB of disk, needs root, debootstrap and unshare. Downloads Debian from where this machine's
# apt does, and libtorch from where its pip does.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Mounts and processes of the trial are the trial's own, and end with it.
if [ "${POTSTILL_TRIAL:-}" != unshared ]; then
    [ "$(id -u)" = 0 ] || fail "root is needed, for chroot and mounts"
    command -v debootstrap >/dev/null || fail "debootstrap is missing (Debian: apt install debootstrap)"
    POTSTILL_TRIAL=unshared exec unshare --mount --pid --fork --kill-child "${BASH_SOURCE[0]}" "$@"
fi

[ $# = 1 ] && [ -f "$1" ] || fail "usage: try_image.sh dist/potstill-….whl (scripts/package/wheel.py makes it)"
wheel=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# The Debian of the last stage, from apt's own mirror of it.
suite=$(sed -n 's/^FROM debian:\([a-z]*\)-slim$/\1/p' Dockerfile)
mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" | head -n 1)
[ -n "$mirror" ] || fail "apt on this machine knows no mirror of Debian $suite"

root=$(mktemp -d "${TMPDIR:-/var/tmp}/potstill-image.XXXXXX")
# The user of the image must get in.
chmod 755 "$root"
trap 'umount --recursive "$root/dev" "$root/proc" 2>/dev/null; rm -rf --one-file-system "$root"' EXIT
echo "Making a clean Debian $suite in $root …"
debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$root.log" 2>&1 || fail "debootstrap failed: $root.log"
rm "$root.log"
mount --rbind --make-rslave /dev "$root/dev"
mount -t proc proc "$root/proc"

# How this machine reaches the network: names, proxies, certificates, pip's index.
cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/root/machine.crt"
[ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
mapfile -t network < <(env | grep -iE '^(pip_|https?_proxy=|no_proxy=)')

cp scripts/package/image/install.sh "$wheel" "$root/root/"
chroot "$root" env --ignore-environment "${network[@]}" PIP_CERT=/root/machine.crt HOME=/root \
    PATH=/usr/sbin:/usr/bin:/sbin:/bin /root/install.sh "/root/${wheel##*/}"
rm "$root/root/"*
du -sh --one-file-system "$root"

# A shell as the image starts its programs: no variable of this machine, the image's user, its folder.
inside() {
    chroot --userspec=1000:1000 "$root" env --ignore-environment --chdir=/data HOME=/home/potstill \
        PATH=/opt/potstill/bin:/usr/local/bin:/usr/bin:/bin "$@"
}
inside potstill --version
for compiler in cc gcc g++ c++ clang cargo rustc ld; do
    ! inside sh -c "command -v $compiler" || fail "$compiler is in the image"
done
inside potstill launch /opt/potstill/share/potstill/configs/digits/one-step.toml --workers 2 --run-id trial \
    --set distillation.iterations=20 --set evaluation.every=20 --set evaluation.samples=100
inside test -s runs/trial/summary.json
echo "The image's last stage works: the run ended with 0."
