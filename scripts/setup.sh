#!/usr/bin/env bash
# Checks the required tools, installs libtorch into .venv and builds everything. Running it again takes little time.
#
# After it, plain `cargo build`, `cargo test` and the built binaries work in any shell without exported variables.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

missing() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

need_rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
command -v cargo >/dev/null || missing "cargo is missing: install Rust $need_rust or newer (https://rustup.rs)"
have_rust=$(rustc --version | sed 's/^rustc \([0-9]*\.[0-9]*\).*/\1/')
[ "$(printf '%s\n%s\n' "$need_rust" "$have_rust" | sort -V | head -n 1)" = "$need_rust" ] ||
    missing "Rust $have_rust is too old: $need_rust or newer is needed (rustup update)"

python=${PYTHON:-python3}
command -v "$python" >/dev/null || missing "$python is missing: install Python 3.10 or newer (or set PYTHON)"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    missing "$("$python" --version) is too old: 3.10 or newer is needed (or set PYTHON to one)"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    missing "$python lacks venv or pip (Debian: apt install python3-venv python3-pip)"

cxx=${CXX:-c++}
command -v "$cxx" >/dev/null || missing "a C++ compiler is missing: install g++ or clang (or set CXX)"
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo '#include <optional>
int main() { return std::optional<int>(0).value(); }' >"$probe/probe.cpp"
"$cxx" -std=c++17 "$probe/probe.cpp" -o "$probe/probe" 2>"$probe/errors" ||
    missing "$cxx does not compile C++17: $(head -n 3 "$probe/errors")"

# The stamp holds the installed versions, so that a second call does nothing.
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "Installing libtorch ($(grep '^torch==' requirements.txt)) into .venv …"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    # A path that does not depend on Python's version, for .cargo/config.toml.
    folder=$(.venv/bin/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
    ln -sfn "$(realpath --relative-to=.venv "$folder")" .venv/libtorch
    cp requirements.txt .venv/installed-requirements.txt
fi

echo "Building …"
cargo build --workspace --quiet "$@"
