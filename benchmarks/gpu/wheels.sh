#!/usr/bin/env bash
# Packs what a GPU machine without a package registry lacks, for CPython 3.12 on x86-64 and CUDA 13:
# all that first.sh and the benchmarks beside it import, but for torch, triton, numpy and pillow.
#
#   benchmarks/gpu/wheels.sh DIR             writes DIR/part-00, DIR/part-01, ...: folders of one
#                                            file of at most 56 MiB each, to be carried one by one
#   benchmarks/gpu/wheels.sh DIR --dry-run   only asks the registry whether all of it is there
#
# There, with the files of all parts in one folder W:
#   cat W/wheels.tar.* | tar x -C W
#   python3 -m pip install -q --no-index --no-deps --target SITE W/*.whl && export PYTHONPATH=SITE
set -euo pipefail
mkdir -p "${1:?usage: wheels.sh DIR [--dry-run]}"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.."

tests=(pytest pytest-xdist execnet hypothesis sortedcontainers iniconfig pluggy pygments
  "packaging<=26.3")
stream=(tyro docstring-parser typeguard typing-extensions rich markdown-it-py mdurl fsspec isal
  safetensors simplejpeg webdataset braceexpand pyyaml nvidia-ml-py)
# DALI names the versions that it goes with. It loads nvJPEG and its kin by name and imports none of
# them: without them it decodes on the host.
dali=(nvidia-dali-cuda130 optree nvtx makefun libcst "gast<=0.7.0" "six<=1.17" astunparse
  "nvidia-nvimgcodec-cu13<0.10,>=0.9" nvidia-libnvcomp-cu13==5.3.0.16
  nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13)

for_there=(--no-deps --only-binary=:all: -c constraints.txt --python-version 3.12 --implementation cp)
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do
  for_there+=(--platform "manylinux_${glibc}_x86_64")
done
for_there+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

python=${PYTHON:-python3}
packages=("${tests[@]}" "${stream[@]}" "${dali[@]}")
if [[ ${2-} == --dry-run ]]; then
  exec "$python" -m pip install -q --dry-run --ignore-installed --target "$out/none" \
    --report "$out/report.json" "${for_there[@]}" "${packages[@]}"
fi
rm -rf "$out/wheels" "$out"/part-*
"$python" -m pip download -q -d "$out/wheels" "${for_there[@]}" "${packages[@]}"
tar c -C "$out/wheels" . | split -b 56M -d - "$out/wheels.tar."
for piece in "$out"/wheels.tar.*; do
  mkdir "$out/part-${piece##*.}"
  mv "$piece" "$out/part-${piece##*.}/"
done
du -sh "$out"/part-*
