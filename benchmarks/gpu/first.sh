#!/usr/bin/env bash
# The first minutes on a GPU: does it run, is it right, how fast is it. README.md beside this file
# says what to carry there and how to read the results.
#
#   benchmarks/gpu/first.sh DATA OUT [gpu|cpu]
#
#   DATA      folder of a sealed data set of JPEGs, some hundred images; phases 0-3 do not read it
#   OUT       receives table.md, log.txt (what every phase printed) and results.tar.gz (all of it),
#             written anew after each phase, so that a run that is cut off keeps what it has
#   cpu       tries everything out on a CPU, with a tiny network
#   FROM, TO  environment: first and last phase, 0 to 7. Phases 0-3 need torch, triton and pytest
#             and take at most 300 s, phases 4-7 need DALI and take at most 335 s
#   PYTHON    environment: the interpreter, python3 by default
#
# Exit code: 0 if every phase ended with 0, 1 if one did not, 2 for a wrong call.
set -uo pipefail

data=${1-} out=${2-} device=${3-gpu}
if [[ -z $out || ! $device =~ ^(gpu|cpu)$ ]]; then
  echo 'usage: benchmarks/gpu/first.sh DATA OUT [gpu|cpu]' >&2
  exit 2
fi
from=${FROM:-0} to=${TO:-7} python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
[[ -d $data ]] && data=$(cd "$data" && pwd)
cd "$(dirname "$0")/../.." || exit 2
if ((from <= 7 && to >= 4)) && [[ ! -f $data/manifest.json ]]; then
  echo "error: DATA: ${data:-''} holds no sealed data set; TO=3 takes the phases that read none" >&2
  exit 2
fi

work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/benchmarks/gpu${PYTHONPATH:+:$PYTHONPATH}
step=(benchmarks/gpu/step.py --device "$device" --out "$work" --skip compiled)
stream=(benchmarks/gpu/stream.py "$data" --device "$device" --out "$work")
# Without tests/conftest.py, which imports what a machine with torch alone lacks.
kernels=(-m pytest -q --no-header -p no:cacheprovider --tb=short --noconftest -m gpu)
tests=(-m pytest -q --no-header -p no:cacheprovider --tb=short -m gpu)
if [[ $device == gpu ]]; then
  export REQUIRE_GPU=1
  # Each test compiles kernels of its own: they do so side by side where pytest-xdist is there.
  "$python" -c 'import xdist' 2>/dev/null && kernels+=(-n 8) && tests+=(-n 4)
  patience=1 small=() large=(--batch 1024) loop=() exact=() rate=()
else
  patience=5 # nothing is measured here, and other work may want the cores
  kernels+=(--collect-only) tests+=(--collect-only)
  small=(--width 0.03125 --batch 2 --matrix 64 --rounds 1 --seconds 0.01)
  large=("${small[@]}" --skip compiled,profile,norm)
  loop=(--width 0.03125 --batch 4 --steps 8 --profiled 2 --samples 48 --seconds 0.05)
  exact=(--threads 1 --batch 8 --samples 48 --checked 16)
  rate=("${exact[@]}" --minutes 0.02 --seconds 0.02 --rounds 1)
fi
mapfile -t kernel_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests/model)
mapfile -t other_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests/pipeline tests/cluster)
results='^[0-9]+ (passed|failed|skipped|error)|^(FAILED|ERROR) |tests collected|no tests'

phases=(); failed=0
{ echo "| phase | exit | seconds | limit | result |"; echo "| --- | --- | --- | --- | --- |"; } >"$work/table.md"

# phase NUMBER-NAME LIMIT PATTERN ARGUMENTS...: run python for at most LIMIT seconds. The result in
# the table are the lines of its log that match PATTERN, a regular expression.
phase() {
  local name=$1 limit=$2 pattern=$3 start=$SECONDS code=0 result
  shift 3
  ((${name%%-*} >= from && ${name%%-*} <= to)) || return 0
  echo "== $name (at most $limit s)"
  if ((${name%%-*} >= 4)) && ! "$python" -c 'import nvidia.dali' 2>"$work/$name.log"; then
    row "$name" - 0 "$limit" "skipped: DALI cannot be imported"
    return 0
  fi
  timeout -k 10 $((limit * patience)) "$python" "$@" >"$work/$name.log" 2>&1 || code=$?
  ((code == 0)) || failed=1
  result=$(grep -aE "$pattern" "$work/$name.log" | sed 's/^figure: //; s/|/,/g' | paste -sd '~' | sed 's/~/; /g')
  ((code != 124 && code != 137)) || result="cut off at its limit; $result"
  ((code == 0)) || [[ $result ]] || result=$(grep -av '^\s*$' "$work/$name.log" | tail -n 1 | cut -c1-200)
  row "$name" "$code" $((SECONDS - start)) "$limit" "$result"
}

# row NAME EXIT SECONDS LIMIT RESULT: add to the table, and put all that there is into OUT.
row() {
  phases+=("$1")
  printf '| %s | %s | %s | %s | %s |\n' "$@" | tee -a "$work/table.md"
  for name in "${phases[@]}"; do printf '\n===== %s\n' "$name"; cat "$work/$name.log"; done >"$out/log.txt"
  cp "$work/table.md" "$out/table.md"
  tar czf "$out/results.tar.gz" -C "$work" .
}

figure='^figure: '
phase 0-machine 30 "$figure" -m parts.machine "$device"
phase 1-kernels 75 "$results" "${kernels[@]}" "${kernel_tests[@]}"
phase 2-step-128 125 "$figure" "${step[@]}" --minutes 1.6 --rounds 3 "${small[@]}"
phase 3-step-1024 70 "$figure" "${step[@]}" --minutes 0.7 --rounds 2 --skip compiled,norm "${large[@]}"
phase 4-pixels 90 '^(jpeg pixels|damage: |error: )' "${stream[@]}" --minutes 1.2 --checked 256 \
  --skip sweep,turns,exact,bare,raw "${exact[@]}"
phase 5-loop 90 "$figure" benchmarks/gpu/loop.py "$data" --device "$device" --out "$work" "${loop[@]}"
phase 6-tests 55 "$results" "${tests[@]}" "${other_tests[@]}"
phase 7-rate 100 '^(turns: (ours|native)|goal: |error: )' "${stream[@]}" --minutes 1.3 --seconds 1.5 \
  --rounds 3 --skip pixels,damage,exact,bare,raw "${rate[@]}"

printf '\n'; cat "$work/table.md"
exit $failed
