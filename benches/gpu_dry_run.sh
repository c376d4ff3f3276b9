#!/usr/bin/env bash
# Every line of `gpu.sh run` on a machine without a GPU: on the emulated driver as a device of compute capability 9.0, with
# stand-ins for nvidia-smi, compute-sanitizer and candle's test, at the smallest shapes. It proves that the script works, not that kernels do.
#
#   benches/gpu_dry_run.sh [PART…]      after `gpu.sh build`; default: all parts
#
# PYTHON names a python3 with PyTorch and pytest (default: that of target/venv, where CI has them, or the one on the path); what it
# lacks is shown as failing. FAULTS has the driver fail on purpose: FAULTS=launches=60 DRIVER="gpu: smoke: every" shows what a fault on a
# GPU would leave (tests/cuda_driver/driver.cpp has the words). Exit code 1 if a check fails that does not need what is missing here.
set -euo pipefail
cd "$(dirname "$0")/.."

stand_ins=$(mktemp -d)
trap 'rm -rf "$stand_ins"' EXIT
cat > "$stand_ins/nvidia-smi" << 'EOF'
#!/usr/bin/env bash
case "$*" in
  *gpu=compute_cap*) echo 9.0 ;;
  *noheader*) echo "Stand-In GPU" ;;
  *) printf 'name, compute_cap\nStand-In GPU, 9.0\n' ;;
esac
EOF
cat > "$stand_ins/compute-sanitizer" << 'EOF'
#!/usr/bin/env bash
while [[ ${1:-} == --* ]]; do shift 1; [[ ${1:-} == --* || -x ${1:-} ]] || shift; done
exec "$@"
EOF
# Candle wants cuBLAS, which no emulated driver starts.
cat > "$stand_ins/candle" << 'EOF'
#!/usr/bin/env bash
echo "candle: a stand-in, $*, libraries $LD_LIBRARY_PATH"
EOF
python=${PYTHON:-}
[ -n "$python" ] || { [ -x target/venv/bin/python ] && python=$PWD/target/venv/bin/python; } || python=$(command -v python3)
printf '#!/usr/bin/env bash\nexec %q "$@"\n' "$python" > "$stand_ins/python3"
chmod +x "$stand_ins"/*

tar xzf target/gpu.tar.gz -C target
driver=$(target/gpu/cuda_driver print-emulated-driver)
record=$(mktemp -d)
status=0
env PATH="$stand_ins:$PATH" LD_LIBRARY_PATH="$driver" SAMTONE_TEST_DRIVER="capability=90 version=12080 ${FAULTS:-}" \
  SHAPES=4,8 SMALL_SHAPES=4,8 OTHER_SHAPES=4,8 SMOKE_SHAPE=4,8 WGPU_SHAPES=8,8 BENCH=--quick DRIVER="${DRIVER:-gpu: one call}" \
  CASES="golden info_nce_plain" GOLDEN=tests/golden/info_nce_plain.json \
  ENGINES=eager PEERS_DEVICE=cpu TORCH_REQUIRE='' TORCH_DEVICE=cpu SAMTONE_TEST_DEVICE=cpu TORCH_ROWS=64 TORCH_TESTS="${TORCH_TESTS:-frozen_towers or weights}" \
  CANDLE_TEST="$stand_ins/candle" ARCHIVE="$stand_ins/record.tar.gz" benches/gpu.sh run "$@" "$record" || status=$?
tar tzf "$stand_ins/record.tar.gz" > /dev/null
echo "the record is in $record"
exit $status
