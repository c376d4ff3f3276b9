#!/usr/bin/env bash
# Checks and times the CUDA backend, the adapters on it, and the WGSL backend on Vulkan, on a machine with a GPU and without Rust.
#
#   benches/gpu.sh build                   here, with cargo and maturin: everything that `run` needs beside the repository, stripped,
#                                          in target/gpu.tar.gz, to be carried along with it. With CANDLE=1 also the test of the candle
#                                          adapter on CUDA, with a compiler from PyPI, with BURN=1 that of the burn adapter: some ten
#                                          minutes more for each
#   benches/gpu.sh run [PART…] [FOLDER]    there, in the repository's root: these parts, or all in this order:
#
#     smoke      90 s   device, every kernel compiled, one small case for each arithmetic and tile, one step timed
#     check     240 s   conformance of all types and tiles, the driver layer, golden files, compute-sanitizer
#     time      240 s   steps by shape, their gradient errors against float64, and steps as plans do not choose them
#     peers     480 s   what others do for the same step
#     adapters  300 s   PyTorch, candle and burn: tests, an example, the overhead of a call
#     wgpu      200 s   the same as `check` and `time` on Vulkan
#
# Each part keeps its own limit, each check in it has one too, and the record grows with every check, so that what is done stays if
# a kernel hangs or the machine is taken away. The record goes to FOLDER (default benches/record/<GPU>/<date>): checks.csv says how
# each check ended, NAME.txt is its whole output. Exit code 1 if any check failed or could not be run.
#
#   SMOKE_BUDGET, CHECK_BUDGET, …   other limits, in seconds
#   SHAPES, SMALL_SHAPES            B,d …: steps that are timed; the former also by peers
#   OTHER_SHAPES                    B,d …: steps that are timed with other kernels, cosines and workspaces
#   DRIVER, CASES, GOLDEN           for a try, less: driver checks and conformance cases whose names contain this, one golden file
#   BENCH, ENGINES, PEERS_DEVICE    likewise: options of bench_cuda, engines and device of peers/run.py
#   TORCH_TESTS, TORCH_DEVICE       likewise: tests whose names match, device of the scripts
#   CANDLE_TEST, BURN_TEST          likewise: what runs in place of these tests
#   ARCHIVE                         a file that is the record as tar.gz after every check
#
# `run` needs the driver; it also uses nvidia-smi, compute-sanitizer, python3 with PyTorch, Triton, pytest and sentence-transformers,
# and a Vulkan driver, and says so where one is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(smoke check time peers adapters wgpu)
declare -A LIMITS=([smoke]=90 [check]=240 [time]=240 [peers]=480 [adapters]=300 [wgpu]=200)
# Binaries for any machine with a driver must not ask for more than this of the C library: that of Ubuntu 22.04.
GLIBC=2.35

build() {
  set -e
  local compiled=${CARGO_TARGET_DIR:-$PWD/target} out=target/gpu
  rm -rf "$out" && mkdir -p "$out"
  cargo build --release --features cudarc,wgpu --example evaluate --example bench_cuda --example bench_wgpu
  cp "$compiled"/release/examples/{evaluate,bench_cuda,bench_wgpu} "$out"
  for test in conformance cuda_driver; do
    binary=$(cargo test --release --features cudarc,wgpu --test "$test" --no-run --message-format=json |
      sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
    cp "$binary" "$out/$test"
  done
  strip "$out"/*
  wheel
  if [ -n "${CANDLE:-}" ]; then
    binary=$(CARGO_TARGET_DIR=$compiled adapters/samtone-candle/ci/build-cuda-test)
    strip -o "$out/candle_cuda" "$binary"
  fi
  if [ -n "${BURN:-}" ]; then
    binary=$(CARGO_TARGET_DIR=$compiled/adapters adapters/samtone-burn/ci/build-cuda-test)
    strip -o "$out/burn" "$binary"
  fi
  git describe --always --dirty > "$out/commit"
  newest=$({ objdump -T "$out"/* 2> /dev/null || true; } | grep -o 'GLIBC_2[0-9.]*' | sort -uV | tail -n 1)
  if [ "$(printf '%s\n' "GLIBC_$GLIBC" "$newest" | sort -V | tail -n 1)" != "GLIBC_$GLIBC" ]; then
    echo "binaries need $newest; build them where the C library is $GLIBC or older"
    exit 1
  fi
  tar czf target/gpu.tar.gz -C target gpu
  ls -l "$out" target/gpu.tar.gz
}

# The PyTorch adapter as it is installed.
wheel() {
  local maturin=${MATURIN:-maturin}
  command -v "$maturin" > /dev/null || maturin=target/venv/bin/maturin
  if command -v "$maturin" > /dev/null; then
    CARGO_TARGET_DIR=$compiled/adapters "$maturin" build --release --locked --quiet --out "$out" \
      --manifest-path adapters/samtone-torch/Cargo.toml
  else
    echo "no maturin, so no wheel of the PyTorch adapter: pip install maturin, or name it in MATURIN"
  fi
}

# check NAME LIMIT COMMAND…: its output goes to a file of that name. It is ended after LIMIT seconds, or when the part's are spent.
check() {
  local name=$1 limit=$2 started rc result
  shift 2
  [ "$limit" -le $((part_end - SECONDS)) ] || limit=$((part_end - SECONDS))
  printf '%-9s %-28s' "$part" "$name"
  if [ "$limit" -lt 3 ]; then
    record "$name" "not run: the seconds of this part are spent" 0
    return 1
  fi
  started=$SECONDS
  timeout -k 10 "$limit" "$@" > "$folder/$name.txt" 2>&1
  rc=$?
  case $rc in
    0) if grep -q '^test result: ok\. 0 passed' "$folder/$name.txt"; then result="FAILED: no test ran" rc=1; else result=ok; fi ;;
    124 | 137) result="FAILED: ended after $limit s" ;;
    *) result="FAILED: exit code $rc" ;;
  esac
  record "$name" "$result" $((SECONDS - started))
  [ $rc -eq 0 ] && return 0
  if [ $rc -eq 124 ] || [ $rc -eq 137 ]; then hanging "$name"; fi
  tail -n 15 "$folder/$name.txt" | cut -c 1-400
  return 1
}

record() { # name, result, seconds
  echo "$2 ($3 s)"
  case $2 in ok | skipped*) ;; *) failed=1 ;; esac
  echo "$part,$1,$2,$3" >> "$folder/checks.csv"
  if [ -n "${ARCHIVE:-}" ]; then tar czf "$ARCHIVE.draft" -C "$folder" . && mv "$ARCHIVE.draft" "$ARCHIVE"; fi
}

# What cannot be run here is a failure, too: a record without it proves less.
missing() { # name, why
  printf '%-9s %-28s' "$part" "$1"
  record "$1" "not run: $2" 0
}

# Appends to the output of conformance the cases that began and did not end.
hanging() {
  local output=$folder/$1.txt begun ended
  begun=$(sed -n 's/^begins: //p' "$output" | sort)
  ended=$(sed -n 's/^test \(.*[^ ]\) *\.\.\. [a-zA-Z].*/\1/p' "$output" | sort)
  comm -23 <(echo "$begun") <(echo "$ended") | sed '/./s/^/began and did not end: /' > "$output.hanging"
  cat "$output.hanging" >> "$output"
  rm "$output.hanging"
}

run() {
  local chosen=() part
  folder=
  for word in "$@"; do
    if [ -n "${LIMITS[$word]:-}" ]; then chosen+=("$word"); else folder=$word; fi
  done
  [ ${#chosen[@]} -gt 0 ] || chosen=("${PARTS[@]}")
  [ ! -e target/gpu.tar.gz ] || tar xzf target/gpu.tar.gz -C target || exit 2
  local gpu
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1 | tr ' A-Z' '-a-z')
  folder=${folder:-benches/record/${gpu:-unknown-gpu}/$(date +%F)}
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  read -ra shapes <<< "${SHAPES:-512,768 2048,1024 8192,256 8192,768 32768,1024 131072,1024}"
  read -ra small_shapes <<< "${SMALL_SHAPES:-256,768 512,768 1024,768 2048,1024}"
  read -ra other_shapes <<< "${OTHER_SHAPES:-2048,1024 8192,256 8192,768 32768,1024}"
  read -ra bench <<< "${BENCH:-}"
  golden=${GOLDEN:-tests/golden}
  # No other backend is looked for: a Vulkan driver that crashes, or a compiler for the emulator, is not what is asked here.
  cuda=(env SAMTONE_REQUIRE=cuda SAMTONE_TRACE=1 RUST_BACKTRACE=0 VK_DRIVER_FILES=/none VK_ICD_FILENAMES=/none CXX=/none)
  vulkan=(env SAMTONE_REQUIRE=wgpu SAMTONE_TRACE=1 RUST_BACKTRACE=0 CUDA_VISIBLE_DEVICES='' CXX=/none)
  # What the driver's compiler makes of the kernels is kept for all processes, wherever the home folder is.
  export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/samtone-kernels} CUDA_CACHE_MAXSIZE=2147483648
  failed=0
  environment > "$folder/env.txt" 2>&1
  [ -e "$folder/checks.csv" ] || echo "part,check,result,seconds" > "$folder/checks.csv"
  for part in "${PARTS[@]}"; do
    [[ " ${chosen[*]} " == *" $part "* ]] || continue
    local limit=${part^^}_BUDGET started=$SECONDS
    part_end=$((SECONDS + ${!limit:-${LIMITS[$part]}}))
    "part_$part"
    echo "$part took $((SECONDS - started)) s"
  done
  echo
  cat "$folder/env.txt"
  for name in smoke-step small-steps small-steps-recomputed step step-recomputed step-kept step-sm80 step-sm80-recomputed samtone-errors.csv overhead peers wgpu-step; do
    local file=$folder/$name
    [ -e "$file" ] || file=$file.txt
    if [ -s "$file" ]; then printf '\n%s\n' "$name" && cut -c 1-200 "$file"; fi
  done
  printf '\nnot ok:\n'
  grep -v ',ok,' "$folder/checks.csv" | tail -n +2
  exit $failed
}

environment() {
  echo "commit $(cat target/gpu/commit)"
  echo "date $(date -u +%FT%TZ)"
  uname -srm
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total,compute_cap --format=csv
  python3 -c 'import sys; print("python", sys.version.split()[0])'
  python3 -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda, "sees", torch.cuda.device_count())'
}

part_smoke() {
  # The driver's compiler takes most of it, once on each machine.
  if ! check smoke-kernels 70 "${cuda[@]}" target/gpu/cuda_driver "${DRIVER:-gpu: smoke}" --test-threads 1; then
    # Each in a process of its own, since after a fault, or a kernel that hangs, nothing more is learned in the same one.
    local kernel
    part_end=$((part_end + 90))
    for kernel in F16:Small F16:Large F16:Cluster F16x2:Small F16x2:Large F16x2:Cluster F16x3:Small F16x3:Large F16x3:Cluster \
      Exact:Small; do
      check "smoke-${kernel/:/-}" 15 "${cuda[@]}" SAMTONE_KERNELS="${kernel/:/ }" \
        target/gpu/cuda_driver "${DRIVER:-gpu: smoke: every}" --test-threads 1
    done
  fi
  check smoke-step 20 "${cuda[@]}" target/gpu/bench_cuda --quick "${SMOKE_SHAPE:-512,768}"
}

part_check() {
  local dtype tool capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1)
  for dtype in bf16 f32 f16; do
    check "conformance-$dtype" 60 "${cuda[@]}" target/gpu/conformance "cuda $dtype: ${CASES:-}" --test-threads 8
    # The kernels of compute capability 9.0, at every size.
    [ "$capability" = 9.0 ] || continue
    check "conformance-clusters-$dtype" 60 "${cuda[@]}" SAMTONE_REQUIRE=cuda,cuda-clusters \
      target/gpu/conformance "cuda-clusters $dtype: ${CASES:-}" --test-threads 8
  done
  # Cosines kept where plans would multiply again: one type is enough, since the smoke test compares bits.
  check conformance-kept 45 "${cuda[@]}" target/gpu/conformance "cuda-kept bf16: ${CASES:-}" --test-threads 8
  [ "$capability" != 9.0 ] || check conformance-clusters-kept 45 "${cuda[@]}" SAMTONE_REQUIRE=cuda,cuda-clusters-kept \
    target/gpu/conformance "cuda-clusters-kept bf16: ${CASES:-}" --test-threads 8
  check kernels 60 "${cuda[@]}" target/gpu/cuda_driver "${DRIVER:-gpu: every}" --test-threads 1
  check driver 60 "${cuda[@]}" target/gpu/cuda_driver "${DRIVER:-gpu: }" --skip smoke: --skip every --test-threads 1
  for dtype in f32 f16 bf16; do
    check "evaluate-$dtype" 30 "${cuda[@]}" target/gpu/evaluate "$golden" --backend cuda --dtype $dtype
  done
  for tool in memcheck racecheck synccheck initcheck; do
    if command -v compute-sanitizer > /dev/null; then
      check "$tool" 60 "${cuda[@]}" compute-sanitizer --tool $tool --error-exitcode 1 \
        target/gpu/cuda_driver "${DRIVER:-gpu: smoke: every}" --test-threads 1
    else
      missing "$tool" "no compute-sanitizer here"
    fi
  done
}

part_time() {
  local written
  check small-steps 40 "${cuda[@]}" target/gpu/bench_cuda "${bench[@]}" "${small_shapes[@]}"
  written=$(mktemp -d)
  check step 100 "${cuda[@]}" target/gpu/bench_cuda "${bench[@]}" --write "$written" "${shapes[@]}"
  check errors 60 python3 benches/peers/judge_files.py "$written" --out "$folder/samtone-errors.csv"
  rm -rf "$written"
  # What docs/hopper.md predicts can be held against these, and what plans choose.
  local ours=("${cuda[@]}" target/gpu/bench_cuda "${bench[@]}")
  check small-steps-recomputed 40 "${ours[@]}" --cosines recomputed "${small_shapes[@]}"
  check step-recomputed 40 "${ours[@]}" --cosines recomputed --workspace 16384 "${other_shapes[@]}"
  check step-kept 40 "${ours[@]}" --cosines kept --workspace 16384 "${other_shapes[@]}"
  check step-sm80 40 "${ours[@]}" --kernels sm80 "${other_shapes[@]}"
  check step-sm80-recomputed 40 "${ours[@]}" --kernels sm80 --cosines recomputed "${other_shapes[@]}"
}

part_peers() {
  # Ours in the same call, so that both met the same clocks.
  [[ " ${chosen[*]} " == *" time "* ]] || check step 100 "${cuda[@]}" target/gpu/bench_cuda "${bench[@]}" "${shapes[@]}"
  local budget=$((part_end - SECONDS - 25)) engines
  read -ra engines <<< "${ENGINES:-}"
  check peers $((budget + 15)) python3 benches/peers/run.py --out "$folder" --shapes "${shapes[@]}" --budget "$budget" \
    --device "${PEERS_DEVICE:-cuda}" ${engines[0]:+--engines "${engines[@]}"}
  check table 20 python3 benches/peers/table.py "$folder"
}

part_adapters() {
  local site wheel
  wheel=$(compgen -G "target/gpu/samtone-*.whl" | tail -n 1)
  if [ -n "$wheel" ]; then
    site=$(mktemp -d)
    check torch-install 40 python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel"
    local torch=(env PYTHONPATH="$site" SAMTONE_REQUIRE="${TORCH_REQUIRE-cuda}" PYTHONDONTWRITEBYTECODE=1)
    local pytest=(python3 -m pytest -q -p no:cacheprovider -rs --maxfail 30 adapters/samtone-torch/tests)
    check torch-gpu 90 "${torch[@]}" "${pytest[@]}" -m gpu ${TORCH_TESTS:+-k "$TORCH_TESTS"}
    check torch-train 40 "${torch[@]}" python3 adapters/samtone-torch/examples/train.py --device "${TORCH_DEVICE:-cuda}"
    check overhead 60 "${torch[@]}" python3 adapters/samtone-torch/benches/overhead.py --device "${TORCH_DEVICE:-cuda}"
    check torch-step 40 "${torch[@]}" python3 adapters/samtone-torch/benches/step.py --device "${TORCH_DEVICE:-cuda}" \
      --rows "${TORCH_ROWS:-4096}" --dtype bfloat16
    check torch-cpu 90 "${torch[@]}" "${pytest[@]}" -m "not gpu" --deselect \
      adapters/samtone-torch/tests/test_cuda.py::test_on_the_emulated_driver ${TORCH_TESTS:+-k "$TORCH_TESTS"}
    rm -rf "$site"
  else
    missing torch "the build had no maturin"
  fi
  # Candle links CUDA's libraries, and burn looks for its compiler: PyTorch brings them along if no toolkit is on the loader's path.
  local libraries candle=${CANDLE_TEST:-target/gpu/candle_cuda} burn=${BURN_TEST:-target/gpu/burn}
  libraries=$(python3 -c 'import nvidia; print(":".join(p + "/cu13/lib" for p in nvidia.__path__))' 2> /dev/null)
  libraries=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries:/usr/local/cuda/lib64
  if [ -e "$candle" ]; then
    check candle 60 env LD_LIBRARY_PATH="$libraries" SAMTONE_REQUIRE=cuda "$candle" --test-threads 1
  else
    not_built candle
  fi
  if [ -e "$burn" ]; then
    burn=(env LD_LIBRARY_PATH="$libraries" SAMTONE_REQUIRE=burn-cuda "$burn" --test-threads 1)
    check burn-extension 40 "${burn[@]}" cuda::extension
    check burn 90 "${burn[@]}" cuda:: --skip extension
  else
    not_built burn
  fi
}

not_built() { # the adapter whose test it is
  printf '%-9s %-28s' "$part" "$1"
  record "$1" "skipped: its test is not in this build (adapters/samtone-$1/README.md)" 0
}

part_wgpu() {
  local dtype
  "${vulkan[@]}" timeout -k 10 30 target/gpu/bench_wgpu 64,16 > "$folder/wgpu-device.txt" 2>&1
  if grep -q "wgpu is not available" "$folder/wgpu-device.txt"; then
    missing wgpu "$(grep -m 1 -o "wgpu is not available.*" "$folder/wgpu-device.txt" | tr , ';')"
    return
  fi
  for dtype in f32 f16 bf16; do
    check "wgpu-conformance-$dtype" 60 "${vulkan[@]}" target/gpu/conformance "wgpu $dtype: ${CASES:-}" --test-threads 4
  done
  for dtype in f32 f16 bf16; do
    check "wgpu-evaluate-$dtype" 30 "${vulkan[@]}" target/gpu/evaluate "$golden" --backend wgpu --dtype $dtype
  done
  read -ra wgpu_shapes <<< "${WGPU_SHAPES:-}"
  check wgpu-step 90 "${vulkan[@]}" target/gpu/bench_wgpu "${wgpu_shapes[@]}"
  # Variants for lesser devices.
  check wgpu-variants 90 "${vulkan[@]}" target/gpu/conformance "${CASES:-wgpu-}" --test-threads 4 \
    --skip cuda --skip cpu --skip reference --skip "wgpu f" --skip "wgpu b"
}

case ${1:-} in
  build) build ;;
  run)
    shift
    run "$@"
    ;;
  *)
    sed -n '2,/^set -/p' "$0" | grep '^#'
    exit 2
    ;;
esac
