#!/usr/bin/env bash
# Make one folder with which gpu_check.py runs on a machine that has a GPU, Python, PyTorch and nothing else of
# Potstill: no compiler, no package registry. About a minute after the build; 20 MB.
#
#     scripts/bench/gpu_bundle.sh [FOLDER]      builds the programs and makes FOLDER, by default gpu-bundle
#     BUILT=1 scripts/bench/gpu_bundle.sh       takes the programs of target/debug as they are
#
# On the machine, with 330 seconds for the most valuable parts, and then what these had no time for:
#
#     python3 gpu-bundle/gpu_check.py --budget 330
#     python3 gpu-bundle/gpu_check.py --budget 330 \
#         --only card,sdxl-compiled,sdxl-lora,sd15-compiled,profile,fits,quality
#
# Both keep results and logs in the folder that OUT names, if it does. The programs are linked to the PyTorch of
# requirements.txt and take libtorch from the Python that starts gpu_check.py: its PyTorch must be of the same version,
# for x86-64 as here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=${1:-gpu-bundle}
if [ -z "${BUILT:-}" ]; then
    scripts/setup.sh
    cargo build -p potstill-cli -p potstill-worker --bins
fi
python=.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/configs" "$work/site"

for program in potstill potstill-worker; do
    strip -o "$work/bin/$program" "target/debug/$program"
done
# Only PyTorch's Python module begins libtorch's tracer. Loaded with LD_PRELOAD, this begins it in the worker; then a
# signal starts a trace. CUDA's half comes first, since the tracer looks once whether there is a GPU.
cat >"$work/profile.c" <<'C'
#include <dlfcn.h>
#include <stddef.h>

__attribute__((constructor)) static void begin_tracer(void) {
  void (*begin)(void) = (void (*)(void))dlsym(NULL, "_ZN5torch18global_kineto_initEv");
  if (begin != NULL) {
    dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
    begin();
  }
}
C
"${CC:-cc}" -shared -fPIC -O2 -s -o "$work/bin/potstill_profile.so" "$work/profile.c" -ldl

mkdir -p "$work/configs/digits" "$work/configs/shapes"
cp configs/digits/{one-step.toml,teacher.safetensors} "$work/configs/digits"
cp -r configs/shapes/{one-step.toml,prompts.jsonl,features.pt,shapes.safetensors,model} "$work/configs/shapes"
for preset in sd15 sdxl; do
    mkdir "$work/configs/$preset"
    cp "configs/$preset"/{base,one-step,four-step-lora}.toml "$work/configs/$preset"
done

# The baseline's library, which is Python alone.
wanted=$(grep '^diffusers==' requirements-test.txt)
installed=$("$python" -m pip show --disable-pip-version-check diffusers 2>/dev/null || true)
if [ "$(sed -n 's/^Version: /diffusers==/p' <<<"$installed")" = "$wanted" ]; then
    cp -r "$(sed -n 's/^Location: //p' <<<"$installed")"/diffusers{,-*.dist-info} "$work/site"
else
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$wanted"
fi

mkdir -p "$out"
tar -C "$work" --exclude=__pycache__ -cJf "$out/bundle.tar.xz" bin configs site
cp scripts/bench/gpu_{check,check_eager,run,models,card}.py "$out"
du -sh --apparent-size "$out"
