#!/usr/bin/env bash
# Checks and times the CUDA backend, the adapters on it, and the WGSL backend on Vulkan, on a machine with a GPU and without Rust.
#
#   benches/gpu.sh build                   here, with cargo, maturin, pip and git: everything that `run` needs beside the repository,
#                                          stripped, in target/gpu.tar.gz, to be carried along with it. With CANDLE=1 also the test of
#                                          the candle adapter on CUDA, with a compiler from PyPI, with BURN=1 that of the burn
#                                          adapter: some ten minutes more for each
#   benches/gpu.sh run [PART…] [FOLDER]    there, in the repository's root, without network, git or pip: these parts in this order, or
#                                          from `smoke` on all:
#
#     first     420 s   what a first visit must tell: every kernel loaded, each arithmetic and tile, conformance, steps beside others
#     second    240 s   what remains of a short visit: kept cosines, kernels of 8.0, prefixes, f16, PyTorch, Vulkan
#
#     smoke      90 s   device, every kernel compiled, one small case for each arithmetic and tile, one step timed
#     check     240 s   conformance of all types and tiles, the driver layer, golden files, compute-sanitizer
#     time      240 s   steps by shape, their gradient errors against float64, and steps as plans do not choose them
#     peers     480 s   what others do for the same step
#     adapters  300 s   PyTorch, candle and burn: tests, an example, the overhead of a call
#     wgpu      200 s   the same as `check` and `time` on Vulkan
#
# Each part keeps its own limit, each check in it has one too, and the record grows with every check, so that what is done stays if
# a kernel hangs or the machine is taken away. The record goes to FOLDER (default benches/record/<GPU>/<date>): summary.md is one
# screen, checks-PART.csv says how each check ended, NAME.txt is its output. Records of one day on the same kind of machine can be
# unpacked into one folder; `python3 benches/peers/summary.py FOLDER` then says all. Exit code 1 if any check failed or could not be run.
#
#   ARCHIVE                         a file that is the record as tar.gz after every check
#   FIRST_BUDGET, SMOKE_BUDGET, …   other limits, in seconds
#   MOST, PATIENCE                  no check may take more seconds than that; every limit times that, for slow machines
#   SHAPES, SMALL_SHAPES            B,d …: steps that are timed; the former also by peers
#   OTHER_SHAPES                    B,d …: steps that are timed with other kernels, cosines and workspaces
#   PREFIX_SHAPES, PREFIXES         B,d …: steps that are timed with Matryoshka prefixes, and which
#   TOOLS                           a folder with what `build` packs, in place of target/gpu.tar.gz
#   DRIVER, CASES, GOLDEN           for a try, less: driver checks and conformance cases whose names contain this, one golden file
#   BENCH, ENGINES, PEERS_DEVICE    likewise: options of bench_cuda, engines and device of peers/run.py
#   TORCH_TESTS, TORCH_DEVICE       likewise: tests whose names match, device of the scripts
#   CANDLE_TEST, BURN_TEST          likewise: what runs in place of these tests
#
# `run` needs the driver; it also uses nvidia-smi, compute-sanitizer, python3 with PyTorch, Triton, pytest and sentence-transformers,
# and says so where one is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(first second smoke check time peers adapters wgpu)
declare -A LIMITS=([first]=420 [second]=240 [smoke]=90 [check]=240 [time]=240 [peers]=480 [adapters]=300 [wgpu]=200)
# Binaries for any machine with a driver must not ask for more than this of the C library: that of Ubuntu 22.04.
GLIBC=2.35
# What some machines let travel with the repository.
MOST_MIB=60
SHAPES_OF_ALL=(512,768 2048,1024 8192,256 8192,768 32768,1024 131072,1024)
PREFIXES=${PREFIXES:-64,128,256,512,768}

build() {
  set -e
  local compiled=${CARGO_TARGET_DIR:-$PWD/target} out=target/gpu
  rm -rf "$out" && mkdir -p "$out"
  # With the features that .ci/run has built them with.
  cargo build --release --features wgpu --example evaluate --example bench_wgpu
  cp "$compiled"/release/examples/{evaluate,bench_wgpu} "$out"
  cargo build --release --features cudarc,wgpu --example bench_cuda
  cp "$compiled/release/examples/bench_cuda" "$out"
  test_binary() { # name, features
    cargo test --release --features "$2" --test "$1" --no-run --message-format=json |
      sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1
  }
  cp "$(test_binary conformance wgpu)" "$out/conformance"
  cp "$(test_binary cuda_driver cudarc,wgpu)" "$out/cuda_driver"
  strip "$out"/*
  python_packages
  vulkan_loader
  if [ -n "${CANDLE:-}" ]; then
    binary=$(CARGO_TARGET_DIR=$compiled adapters/samtone-candle/ci/build-cuda-test)
    strip -o "$out/candle_cuda" "$binary"
  fi
  if [ -n "${BURN:-}" ]; then
    binary=$(CARGO_TARGET_DIR=$compiled/adapters adapters/samtone-burn/ci/build-cuda-test)
    strip -o "$out/burn" "$binary"
  fi
  git describe --always --dirty > "$out/commit" || echo unknown > "$out/commit"
  newest=$({ objdump -T "$out"/* "$out"/lib/* 2> /dev/null || true; } | grep -o 'GLIBC_2[0-9.]*' | sort -uV | tail -n 1)
  if [ "$(printf '%s\n' "GLIBC_$GLIBC" "$newest" | sort -V | tail -n 1)" != "GLIBC_$GLIBC" ]; then
    echo "binaries need $newest; build them where the C library is $GLIBC or older"
    exit 1
  fi
  tar czf target/gpu.tar.gz -C target gpu
  ls "$out" "$out/site"
  local mib=$(($(stat -c %s target/gpu.tar.gz) >> 20))
  echo "target/gpu.tar.gz has $mib MiB, of commit $(cat "$out/commit")"
  [ $mib -lt $MOST_MIB ] || echo "more than $MOST_MIB MiB may be more than travels: build without CANDLE and BURN"
  cat << 'EOF'
On the machine with the GPU, in the repository's root, which needs target/gpu.tar.gz beside the files of git:
  ARCHIVE=first.tar.gz benches/gpu.sh run first      # 7 minutes at most
  ARCHIVE=second.tar.gz benches/gpu.sh run second    # 4 minutes at most
Bring both archives back, and unpack them into one folder benches/record/<GPU>/<date>.
EOF
}

# The PyTorch adapter, and the peer that pip has to fetch, as folders, so that nothing is installed there.
python_packages() {
  local maturin=${MATURIN:-maturin} python=target/venv/bin/python wheels wheel
  command -v "$maturin" > /dev/null || maturin=target/venv/bin/maturin
  [ -x "$python" ] || python=python3
  wheels=$(mktemp -d)
  if command -v "$maturin" > /dev/null; then
    CARGO_TARGET_DIR=$compiled/adapters "$maturin" build --release --locked --quiet --out "$wheels" \
      --manifest-path adapters/samtone-torch/Cargo.toml
  else
    echo "no maturin, so no PyTorch adapter: pip install maturin, or name it in MATURIN"
  fi
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --dest "$wheels" \
    --requirement benches/peers/requirements.txt || echo "pip fetched nothing, so no memeff among the peers"
  mkdir -p "$out/site"
  for wheel in "$wheels"/*.whl; do
    [ ! -e "$wheel" ] || "$python" -m zipfile -e "$wheel" "$out/site"
  done
  rm -rf "$wheels"
}

# The loader of Vulkan, and of the libraries that NVIDIA's driver for it asks for: some machines have the driver without them.
vulkan_loader() {
  local name path
  mkdir -p "$out/lib"
  for name in libvulkan.so.1 libGLdispatch.so.0 libGLX.so.0; do
    path=$(ldconfig -p | sed -n "s/.*$name (libc6,x86-64) => //p" | head -n 1)
    [ -z "$path" ] || cp -L "$path" "$out/lib/$name"
  done
}

# check NAME LIMIT COMMAND…: its output goes to a file of that name. It is ended after LIMIT seconds, or when the part's are spent.
check() {
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) started rc result process
  shift 2
  [ "$limit" -le "${MOST:-$limit}" ] || limit=$MOST
  [ "$limit" -le $((part_end - SECONDS)) ] || limit=$((part_end - SECONDS))
  printf '%-9s %-32s' "$part" "$name"
  if [ "$limit" -lt 3 ]; then
    record "$name" "not run: the seconds of this part are spent" 0
    return 1
  fi
  started=$SECONDS
  timeout -k 5 "$limit" "$@" > "$folder/$name.txt" 2>&1 &
  process=$!
  # A process that waits for a device may outlive its end for long; then it is left behind.
  { # the shell's own remarks about killed processes say nothing new
    while kill -0 $process && [ $((SECONDS - started)) -le $((limit + 8)) ]; do sleep 0.1; done
    if kill -0 $process; then disown $process && rc=left; else wait $process; rc=$?; fi
  } 2> /dev/null
  case $rc in
    left) result="FAILED: could not be ended after $limit s" ;;
    0) if grep -q '^test result: ok\. 0 passed' "$folder/$name.txt"; then result="FAILED: no test ran" rc=1; else result=ok; fi ;;
    124 | 137) result="FAILED: ended after $limit s" ;;
    *) result="FAILED: exit code $rc" ;;
  esac
  case $rc in 124 | 137 | left) hanging "$name" ;; esac
  # Of thousands of cases those that passed are counted, not listed.
  sed -i '/^begins: /d; /^test .* \.\.\. \(ok\|ignored\)$/d' "$folder/$name.txt"
  record "$name" "$result" $((SECONDS - started))
  [ "$rc" = 0 ] && return 0
  tail -n 15 "$folder/$name.txt" | cut -c 1-400
  return 1
}

record() { # name, result, seconds
  local checks=$folder/checks-$part.csv
  echo "$2 ($3 s)"
  case $2 in ok | skipped*) ;; *) failed=1 ;; esac
  [ -e "$checks" ] || echo "part,check,result,seconds" > "$checks"
  echo "$part,$1,$2,$3" >> "$checks"
  timeout 20 python3 benches/peers/summary.py "$folder" > /dev/null 2>&1
  if [ -n "${ARCHIVE:-}" ]; then tar czf "$ARCHIVE.draft" -C "$folder" . && mv "$ARCHIVE.draft" "$ARCHIVE"; fi
}

# What cannot be run here is a failure, too: a record without it proves less.
missing() { # name, why
  printf '%-9s %-32s' "$part" "$1"
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
  [ ${#chosen[@]} -gt 0 ] || chosen=("${PARTS[@]:2}")
  tools=${TOOLS:-target/gpu}
  # Whoever runs this may not be the user who built it.
  [ -n "${TOOLS:-}" ] || tar xzf target/gpu.tar.gz --no-same-owner -C target || exit 2
  tools=$(cd "$tools" && pwd) || exit 2
  local gpu
  gpu=$(smi name | tr ' A-Z' '-a-z')
  capability=$(smi compute_cap)
  folder=${folder:-benches/record/${gpu:-unknown-gpu}/$(date +%F)}
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  read -ra small_shapes <<< "${SMALL_SHAPES:-256,768 512,768 1024,768 2048,1024}"
  read -ra bench <<< "${BENCH:-}"
  golden=${GOLDEN:-tests/golden}
  # No other backend is looked for: a Vulkan driver that crashes, or a compiler for the emulator, is not what is asked here.
  cuda=(env SAMTONE_REQUIRE=cuda SAMTONE_TRACE=1 RUST_BACKTRACE=0 VK_DRIVER_FILES=/none VK_ICD_FILENAMES=/none CXX=/none)
  vulkan=(env SAMTONE_REQUIRE=wgpu SAMTONE_TRACE=1 RUST_BACKTRACE=0 CUDA_VISIBLE_DEVICES='' CXX=/none)
  ldconfig -p 2> /dev/null | grep -q libvulkan.so.1 || vulkan+=("LD_LIBRARY_PATH=$tools/lib:${LD_LIBRARY_PATH:-}")
  # Where a container has NVIDIA's driver, its description for Vulkan may lie beside it.
  local description=/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json
  if [ -z "${VK_DRIVER_FILES:-}" ] && [ -e $description ]; then vulkan+=("VK_DRIVER_FILES=$description"); fi
  torch=(env PYTHONPATH="$tools/site" SAMTONE_REQUIRE="${TORCH_REQUIRE-cuda}")
  pytest=(python3 -m pytest -q -p no:cacheprovider -rs --maxfail 30 adapters/samtone-torch/tests)
  # What the driver's compiler makes of the kernels is kept for all processes, wherever the home folder is.
  export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-${TMPDIR:-/tmp}/samtone-kernels} CUDA_CACHE_MAXSIZE=2147483648 CUDA_CACHE_DISABLE=0
  export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
  failed=0
  environment > "$folder/env.txt" 2>&1
  # Behind the first check: a cold PyTorch takes half a minute.
  timeout 90 python3 -c 'import torch; print("torch", torch.__version__, "cuda", torch.version.cuda, "sees", torch.cuda.device_count())' \
    >> "$folder/env.txt" 2>&1 &
  local about_torch=$!
  for part in "${PARTS[@]}"; do
    [[ " ${chosen[*]} " == *" $part "* ]] || continue
    local limit=${part^^}_BUDGET started=$SECONDS
    rm -f "$folder/checks-$part.csv"
    part_end=$((SECONDS + ${!limit:-${LIMITS[$part]}} * ${PATIENCE:-1}))
    "part_$part"
    echo "$part took $((SECONDS - started)) s"
  done
  wait $about_torch
  python3 benches/peers/summary.py "$folder" || cat "$folder"/checks-*.csv
  exit $failed
}

smi() { timeout 10 nvidia-smi --query-gpu="$1" --format=csv,noheader 2> /dev/null | head -n 1; }

environment() {
  echo "commit $(cat "$tools/commit" 2> /dev/null || echo unknown)"
  echo "date $(date -u +%FT%TZ)"
  uname -srm
  timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total,compute_cap --format=csv
  python3 -c 'import os, sys; print("cores", os.cpu_count()); print("python", sys.version.split()[0])'
}

part_first() {
  shapes_or 512,768 8192,768 32768,1024
  written=$(mktemp -d)
  check load 60 "${cuda[@]}" "$tools/cuda_driver" "gpu: smoke: the driver" --test-threads 1
  check tiles 25 "${cuda[@]}" "$tools/cuda_driver" "${DRIVER:-gpu: smoke: every}" --test-threads 1 || each_kernel 12
  conformance 40 bf16
  conformance 30 f32
  steps 40 samtone_query
  steps 25 qwen3 --temperature 0.05 --margin 0.1
  steps 20 clip --temperature 0.05
  check errors 40 python3 benches/peers/judge_files.py "$written" --out "$folder"
  rm -rf "$written"
  # The strongest of each kind; whatever the seconds that are left allow, in this order.
  compared "products 12" "memeff" "checkpoint" "compile autocast" "compile tf32"
}

part_second() {
  read -ra other_shapes <<< "${OTHER_SHAPES:-8192,768 32768,1024}"
  read -ra prefix_shapes <<< "${PREFIX_SHAPES:-512,768 8192,768 32768,1024}"
  local ours=("${cuda[@]}" "$tools/bench_cuda" "${bench[@]}")
  # The driver's compiler again, should this be another machine than the first part's.
  check load-again 40 "${cuda[@]}" "$tools/cuda_driver" "gpu: smoke: the driver" --test-threads 1
  check step-recomputed 18 "${ours[@]}" --cosines recomputed --workspace 16384 "${other_shapes[@]}"
  check step-kept 18 "${ours[@]}" --cosines kept --workspace 16384 "${other_shapes[@]}"
  check step-sm80 18 "${ours[@]}" --kernels sm80 "${other_shapes[@]}"
  check step-prefixes 15 "${ours[@]}" --prefixes "$PREFIXES" "${prefix_shapes[@]}"
  conformance 12 bf16 -kept
  conformance 14 f16
  if [ -d "$tools/site/samtone" ]; then
    check torch-gpu 45 "${torch[@]}" "${pytest[@]}" -m gpu ${TORCH_TESTS:+-k "$TORCH_TESTS"}
    check overhead 18 "${torch[@]}" python3 adapters/samtone-torch/benches/overhead.py --device "${TORCH_DEVICE:-cuda}"
    check torch-step 12 "${torch[@]}" python3 adapters/samtone-torch/benches/step.py --device "${TORCH_DEVICE:-cuda}" \
      --rows "${TORCH_ROWS:-4096}" --dtype bfloat16
  else
    missing torch "the build had no maturin"
  fi
  has_vulkan || return
  check wgpu-evaluate-f32 15 "${vulkan[@]}" "$tools/evaluate" "$golden" --backend wgpu --dtype f32
  read -ra wgpu_shapes <<< "${WGPU_SHAPES:-2048,768}"
  check wgpu-step 20 "${vulkan[@]}" "$tools/bench_wgpu" "${wgpu_shapes[@]}"
}

shapes_or() { # default shapes, unless the user named some
  if [ -n "${SHAPES:-}" ]; then read -ra shapes <<< "$SHAPES"; else shapes=("$@"); fi
}

# Each in a process of its own, since after a fault, or a kernel that hangs, nothing more is learned in the same one.
each_kernel() { # limit
  local kernel
  for kernel in F16:Small F16:Large F16:Cluster F16x2:Small F16x2:Large F16x2:Cluster F16x3:Small F16x3:Large F16x3:Cluster \
    Exact:Small; do
    check "kernel-${kernel/:/-}" "$1" "${cuda[@]}" SAMTONE_KERNELS="${kernel/:/ }" \
      "$tools/cuda_driver" "${DRIVER:-gpu: smoke: every}" --test-threads 1
  done
}

# Of the kernels that plans take, and, where there are any, of those of compute capability 9.0 at every size.
conformance() { # limit, type, suffix of the backend
  local kept=${3:-}
  check "conformance$kept-$2" "$1" "${cuda[@]}" "$tools/conformance" "cuda$kept $2: ${CASES:-}" --test-threads 8
  [ "$capability" != 9.0 ] || check "conformance-clusters$kept-$2" "$1" "${cuda[@]}" "SAMTONE_REQUIRE=cuda,cuda-clusters$kept" \
    "$tools/conformance" "cuda-clusters$kept $2: ${CASES:-}" --test-threads 8
}

steps() { # limit, loss, options of bench_cuda
  local loss=$2 name=step
  [ "$loss" = samtone_query ] || name=step-$loss
  check "$name" "$1" "${cuda[@]}" "$tools/bench_cuda" "${bench[@]}" --loss "$loss" "${@:3}" ${written:+--write "$written/$loss"} \
    "${shapes[@]}"
}

compared() { # engines; what the last of them takes too long for is ended within the part's seconds
  local budget=$((part_end - SECONDS - 25)) engines=("$@")
  [ -z "${ENGINES:-}" ] || read -ra engines <<< "$ENGINES"
  check peers $((budget + 15)) env PYTHONPATH="$tools/site" python3 benches/peers/run.py --out "$folder" \
    --shapes "${shapes[@]}" --budget "$budget" --device "${PEERS_DEVICE:-cuda}" ${engines[0]:+--engines "${engines[@]}"}
  check table 10 python3 benches/peers/table.py "$folder"
}

part_smoke() {
  # The driver's compiler takes most of it, once on each machine.
  if ! check smoke-kernels 70 "${cuda[@]}" "$tools/cuda_driver" "${DRIVER:-gpu: smoke}" --test-threads 1; then
    part_end=$((part_end + 90))
    each_kernel 15
  fi
  check smoke-step 20 "${cuda[@]}" "$tools/bench_cuda" --quick "${SMOKE_SHAPE:-512,768}"
}

part_check() {
  local dtype tool
  for dtype in bf16 f32 f16; do
    conformance 60 $dtype
  done
  # Cosines kept where plans would multiply again: one type is enough, since the smoke test compares bits.
  conformance 45 bf16 -kept
  check kernels 60 "${cuda[@]}" "$tools/cuda_driver" "${DRIVER:-gpu: every}" --test-threads 1
  check driver 60 "${cuda[@]}" "$tools/cuda_driver" "${DRIVER:-gpu: }" --skip smoke: --skip every --test-threads 1
  for dtype in f32 f16 bf16; do
    check "evaluate-$dtype" 30 "${cuda[@]}" "$tools/evaluate" "$golden" --backend cuda --dtype $dtype
  done
  for tool in memcheck racecheck synccheck initcheck; do
    if command -v compute-sanitizer > /dev/null; then
      check "$tool" 60 "${cuda[@]}" compute-sanitizer --tool $tool --error-exitcode 1 \
        "$tools/cuda_driver" "${DRIVER:-gpu: smoke: every}" --test-threads 1
    else
      missing "$tool" "no compute-sanitizer here"
    fi
  done
}

part_time() {
  shapes_or "${SHAPES_OF_ALL[@]}"
  read -ra other_shapes <<< "${OTHER_SHAPES:-2048,1024 8192,256 8192,768 32768,1024}"
  local ours=("${cuda[@]}" "$tools/bench_cuda" "${bench[@]}")
  check small-steps 40 "${ours[@]}" "${small_shapes[@]}"
  written=$(mktemp -d)
  steps 100 samtone_query
  check errors 60 python3 benches/peers/judge_files.py "$written" --out "$folder"
  rm -rf "$written"
  # What docs/hopper.md predicts can be held against these, and what plans choose.
  check small-steps-recomputed 40 "${ours[@]}" --cosines recomputed "${small_shapes[@]}"
  check step-recomputed 40 "${ours[@]}" --cosines recomputed --workspace 16384 "${other_shapes[@]}"
  check step-kept 40 "${ours[@]}" --cosines kept --workspace 16384 "${other_shapes[@]}"
  check step-sm80 40 "${ours[@]}" --kernels sm80 "${other_shapes[@]}"
  check step-sm80-recomputed 40 "${ours[@]}" --kernels sm80 --cosines recomputed "${other_shapes[@]}"
  check step-prefixes 40 "${ours[@]}" --prefixes "$PREFIXES" "${shapes[@]}"
}

part_peers() {
  shapes_or "${SHAPES_OF_ALL[@]}"
  # Ours in the same call, so that both met the same clocks.
  written=
  [[ " ${chosen[*]} " == *" time "* ]] || steps 100 samtone_query
  compared
}

part_adapters() {
  if [ -d "$tools/site/samtone" ]; then
    check torch-gpu 90 "${torch[@]}" "${pytest[@]}" -m gpu ${TORCH_TESTS:+-k "$TORCH_TESTS"}
    check torch-train 40 "${torch[@]}" python3 adapters/samtone-torch/examples/train.py --device "${TORCH_DEVICE:-cuda}"
    check overhead 60 "${torch[@]}" python3 adapters/samtone-torch/benches/overhead.py --device "${TORCH_DEVICE:-cuda}"
    check torch-step 40 "${torch[@]}" python3 adapters/samtone-torch/benches/step.py --device "${TORCH_DEVICE:-cuda}" \
      --rows "${TORCH_ROWS:-4096}" --dtype bfloat16
    check torch-cpu 90 "${torch[@]}" "${pytest[@]}" -m "not gpu" --deselect \
      adapters/samtone-torch/tests/test_cuda.py::test_on_the_emulated_driver ${TORCH_TESTS:+-k "$TORCH_TESTS"}
  else
    missing torch "the build had no maturin"
  fi
  # Candle links CUDA's libraries, and burn looks for its compiler: PyTorch brings them along if no toolkit is on the loader's path.
  local libraries candle=${CANDLE_TEST:-$tools/candle_cuda} burn=${BURN_TEST:-$tools/burn}
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
  printf '%-9s %-32s' "$part" "$1"
  record "$1" "skipped: its test is not in this build (adapters/samtone-$1/README.md)" 0
}

has_vulkan() {
  "${vulkan[@]}" timeout -k 5 20 "$tools/bench_wgpu" 64,16 > "$folder/wgpu-device.txt" 2>&1
  grep -q "wgpu is not available" "$folder/wgpu-device.txt" || return 0
  missing wgpu "$(grep -m 1 -o "wgpu is not available.*" "$folder/wgpu-device.txt" | tr , ';')"
  return 1
}

part_wgpu() {
  local dtype
  has_vulkan || return
  for dtype in f32 f16 bf16; do
    check "wgpu-conformance-$dtype" 60 "${vulkan[@]}" "$tools/conformance" "wgpu $dtype: ${CASES:-}" --test-threads 4
  done
  for dtype in f32 f16 bf16; do
    check "wgpu-evaluate-$dtype" 30 "${vulkan[@]}" "$tools/evaluate" "$golden" --backend wgpu --dtype $dtype
  done
  read -ra wgpu_shapes <<< "${WGPU_SHAPES:-}"
  check wgpu-step 90 "${vulkan[@]}" "$tools/bench_wgpu" "${wgpu_shapes[@]}"
  # Variants for lesser devices.
  check wgpu-variants 90 "${vulkan[@]}" "$tools/conformance" "${CASES:-wgpu-}" --test-threads 4 \
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
