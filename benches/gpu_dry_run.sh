#!/usr/bin/env bash
# Every line of `gpu.sh run` on a machine without a GPU: on the emulated driver as a device of compute capability 9.0, with
# stand-ins for nvidia-smi, compute-sanitizer and candle's test, at the smallest shapes, without git and a home folder. It proves that
# the script works, not that kernels do.
#
#   benches/gpu_dry_run.sh [PART…]      after `gpu.sh build`; default: all parts, and `faults`
#
# `faults` has stand-ins for all programs, of which one hangs, one cannot be ended, and one fails: each must cost its own check alone
# and be named.
#
# PYTHON names a python3 with PyTorch and pytest (default: that of target/venv, where CI has them, or the one on the path); what it
# lacks is shown as failing. FAULTS has the driver fail on purpose: FAULTS=launches=60 DRIVER="gpu: smoke: every" shows what a fault on a
# GPU would leave (tests/cuda_driver/driver.cpp has the words). Exit code 1 if a check fails that does not need what is missing here.
set -euo pipefail
cd "$(dirname "$0")/.."

stand_ins=$(mktemp -d)
trap 'rm -rf "$stand_ins"' EXIT
stand_in() { # name; its text comes from standard input
  mkdir -p "$(dirname "$stand_ins/$1")"
  { echo '#!/usr/bin/env bash' && cat; } > "$stand_ins/$1"
  chmod +x "$stand_ins/$1"
}
stand_in nvidia-smi << 'EOF'
case "$*" in
  *gpu=compute_cap*) echo 9.0 ;;
  *noheader*) echo "Stand-In GPU" ;;
  *) printf 'name, compute_cap\nStand-In GPU, 9.0\n' ;;
esac
EOF
stand_in compute-sanitizer << 'EOF'
while [[ ${1:-} == --* ]]; do shift 1; [[ ${1:-} == --* || -x ${1:-} ]] || shift; done
exec "$@"
EOF
# Candle wants cuBLAS, which no emulated driver starts.
stand_in candle << 'EOF'
echo "candle: a stand-in, $*, libraries $LD_LIBRARY_PATH"
EOF
stand_in git << 'EOF'
echo "git is not there" >&2 && exit 127
EOF
python=${PYTHON:-}
[ -n "$python" ] || { [ -x target/venv/bin/python ] && python=$PWD/target/venv/bin/python; } || python=$(command -v python3)
stand_in python3 <<< "exec $(printf '%q' "$python") \"\$@\""

# What programs leave that hang, cannot be ended, or fail.
faults() {
  local tools=$stand_ins/tools record=$stand_ins/faults code=0 name
  for name in cuda_driver evaluate bench_wgpu; do
    stand_in "tools/$name" <<< 'echo "test result: ok. 1 passed"'
  done
  stand_in tools/conformance << 'EOF'
case $1 in
  "cuda bf16: "*)
    printf 'begins: cuda bf16: one\nbegins: cuda bf16: two\ntest cuda bf16: one ... ok\n'
    trap '' TERM # as a process does that waits for a device
    echo $$ > "$(dirname "$0")/hanging"
    while true; do sleep 1; done
    ;;
  *) echo "test result: ok. 1 passed" ;;
esac
EOF
  stand_in tools/bench_cuda << 'EOF'
case " $* " in
  *" qwen3 "*) echo "Error: planted" && exit 3 ;;
  # Nobody ends it, since what would is stopped; as where a signal waits for a device.
  *" clip "*) echo "$PPID $$" > "$(dirname "$0")/left" && kill -STOP $PPID && while true; do sleep 1; done ;;
esac
printf 'rows,dim,milliseconds,tflops,extra_mib,loss\n4,8,2.0,1.0,1.0,1.5\n'
EOF
  stand_in tools/python/python3 << EOF
case "\$*" in *summary.py*) exec $(printf '%q' "$python") "\$@" ;; esac
EOF
  env PATH="$stand_ins/tools/python:$stand_ins:$PATH" TOOLS="$tools" MOST=3 ARCHIVE="$stand_ins/faults.tar.gz" \
    benches/gpu.sh run first "$record" || code=$?
  local left
  read -ra left < "$tools/left"
  kill -KILL "${left[@]}"
  local checks=$record/checks-first.csv
  expect() { "${@:2}" || { echo "a dry run with faults: $1" && exit 1; }; }
  expect "exit code $code, not 1" [ $code -eq 1 ]
  expect "the hanging check is not named" grep -q '^first,conformance-bf16,FAILED: ended after 3 s,' "$checks"
  expect "the failing check is not named" grep -q '^first,step-qwen3,FAILED: exit code 3,' "$checks"
  expect "what cannot be ended is not named" grep -q '^first,step-clip,FAILED: could not be ended after 3 s,' "$checks"
  expect "other checks failed" [ "$(grep -c ',FAILED' "$checks")" = 3 ]
  expect "what came after did not run" grep -q '^first,table,ok,' "$checks"
  expect "the case that hung is not named" grep -q '^began and did not end: cuda bf16: two$' "$record/conformance-bf16.txt"
  expect "what hung still runs" [ ! -e "/proc/$(cat "$tools/hanging")" ]
  expect "the summary lacks the hanging case" grep -q 'conformance-bf16.*ended after 3 s.*began and did not end' "$record/summary.md"
  expect "the summary lacks the failing step" grep -q 'step-qwen3.*exit code 3.*Error: planted' "$record/summary.md"
  expect "the summary lacks a step" grep -q '^| \*\*samtone\*\* | 2 ms' "$record/summary.md"
  tar xzf "$stand_ins/faults.tar.gz" -C "$stand_ins" ./summary.md
  expect "the archive has another summary" cmp -s "$record/summary.md" "$stand_ins/summary.md"
}

parts=("$@")
[ $# -gt 0 ] || parts=(first second smoke check time peers adapters wgpu faults)
status=0
if [[ " ${parts[*]} " == *" faults "* ]]; then faults; fi
read -ra parts <<< "$(printf ' %s ' "${parts[@]}" | sed 's/ faults / /')"
if [ ${#parts[@]} -gt 0 ]; then
  tar xzf target/gpu.tar.gz -C target
  driver=$(target/gpu/cuda_driver print-emulated-driver)
  record=$(mktemp -d)
  env -u HOME PATH="$stand_ins:$PATH" LD_LIBRARY_PATH="$driver" SAMTONE_TEST_DRIVER="capability=90 version=12080 ${FAULTS:-}" \
    SHAPES=4,8 SMALL_SHAPES=4,8 OTHER_SHAPES=4,8 SMOKE_SHAPE=4,8 PREFIX_SHAPES=4,8 PREFIXES=3,8 WGPU_SHAPES=8,8 BENCH=--quick DRIVER="${DRIVER:-gpu: one call}" \
    CASES="golden info_nce_plain" GOLDEN=tests/golden/info_nce_plain.json \
    ENGINES=eager PEERS_DEVICE=cpu TORCH_REQUIRE='' TORCH_DEVICE=cpu SAMTONE_TEST_DEVICE=cpu TORCH_ROWS=64 TORCH_TESTS="${TORCH_TESTS:-frozen_towers or weights}" \
    PATIENCE=5 CANDLE_TEST="$stand_ins/candle" ARCHIVE="$stand_ins/record.tar.gz" benches/gpu.sh run "${parts[@]}" "$record" || status=$?
  tar tzf "$stand_ins/record.tar.gz" > /dev/null
  echo "the record is in $record"
fi
exit $status
