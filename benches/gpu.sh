#!/usr/bin/env bash
# Checks and times the CUDA backend, and the WGSL backend on Vulkan, on a machine with a GPU and without Rust.
#
#   benches/gpu.sh build           here, with cargo: stripped binaries in target/gpu, to be carried along with the repository
#   benches/gpu.sh run [FOLDER]    there, in the repository's root: everything in one call; the record goes to FOLDER
#                                  (default benches/record/<GPU>/<date>). Exit code 1 if any check failed
#
# `run` needs the driver; it also uses nvidia-smi, compute-sanitizer, python3 with PyTorch and Triton, and a Vulkan driver, and
# says so where one is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

build() {
  set -e
  rm -rf target/gpu && mkdir -p target/gpu
  cargo build --release --features cudarc,wgpu --example evaluate --example bench_cuda --example bench_wgpu
  cp target/release/examples/{evaluate,bench_cuda,bench_wgpu} target/gpu/
  for test in conformance cuda_driver; do
    binary=$(cargo test --release --features cudarc,wgpu --test "$test" --no-run --message-format=json |
      sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    cp "$binary" "target/gpu/$test"
  done
  strip target/gpu/*
  git describe --always --dirty > target/gpu/commit
  ls -l target/gpu
}

run() {
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1 | tr ' A-Z' '-a-z')
  folder=${1:-benches/record/${gpu:-unknown-gpu}/$(date +%F)}
  mkdir -p "$folder"
  failed=0
  check() { # name, command…: its output goes to a file of that name
    local name=$1
    shift
    printf '%-28s' "$name"
    if "$@" > "$folder/$name.txt" 2>&1; then echo ok; else echo "FAILED (rc $?)"; failed=1; tail -n 8 "$folder/$name.txt"; fi
  }
  {
    echo "commit $(cat target/gpu/commit)"
    echo "date $(date -u +%FT%TZ)"
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv
  } > "$folder/env.txt" 2>&1
  export SAMTONE_REQUIRE=cuda
  check conformance target/gpu/conformance "cuda " --test-threads 4
  # The kernels of compute capability 9.0 at every size; ignored elsewhere.
  check conformance-clusters target/gpu/conformance "cuda-clusters " --test-threads 4
  check driver target/gpu/cuda_driver gpu --test-threads 1
  for dtype in f32 f16 bf16; do
    check "evaluate-$dtype" target/gpu/evaluate tests/golden --backend cuda --dtype $dtype
  done
  for tool in memcheck racecheck synccheck initcheck; do
    if command -v compute-sanitizer > /dev/null; then
      check "$tool" compute-sanitizer --tool $tool --error-exitcode 1 target/gpu/evaluate \
        tests/golden/samtone_both_hard_negatives.json --backend cuda --dtype bf16
    else
      echo "$tool: no compute-sanitizer here"
    fi
  done
  # The same shapes in the same call, so that both met the same clocks. PEERS_BUDGET: seconds for all peers together.
  shapes=(512,768 2048,1024 8192,256 8192,768 32768,1024 131072,1024)
  written=$(mktemp -d)
  check step target/gpu/bench_cuda --write "$written" "${shapes[@]}"
  check small-steps target/gpu/bench_cuda 256,768 512,768 1024,768 2048,1024
  check errors python3 benches/peers/judge_files.py "$written" --out "$folder/samtone-errors.csv"
  rm -rf "$written"
  check peers python3 benches/peers/run.py --out "$folder" --shapes "${shapes[@]}" --budget "${PEERS_BUDGET:-480}"
  check table python3 benches/peers/table.py "$folder"
  target/gpu/bench_wgpu 64,16 > "$folder/wgpu-device.txt" 2>&1
  if grep -q "wgpu is not available" "$folder/wgpu-device.txt"; then
    grep -m 1 "wgpu is not available" "$folder/wgpu-device.txt" | tee "$folder/wgpu-step.txt"
  else
    check wgpu-conformance env SAMTONE_REQUIRE=wgpu target/gpu/conformance wgpu --test-threads 4
    for dtype in f32 f16 bf16; do
      check "wgpu-evaluate-$dtype" target/gpu/evaluate tests/golden --backend wgpu --dtype $dtype
    done
    check wgpu-step target/gpu/bench_wgpu
  fi
  cat "$folder/env.txt" "$folder/step.txt" "$folder/peers.txt" "$folder/wgpu-step.txt"
  exit $failed
}

case ${1:-} in
  build) build ;;
  run) run "${2:-}" ;;
  *) sed -n '2,8p' "$0"; exit 2 ;;
esac
