#!/usr/bin/env bash
# Installs what Darkroom needs beside a Rust toolchain, and nothing that is there already:
# RabbitMQ and PostgreSQL from Debian, libtorch from PyPI's torch wheel into .deps/ of this checkout,
# and CLIP's byte-pair vocabulary for the tokenizer tests; with `--tests` cuDNN, too, by which the tests make
# execution plans. Safe to run again; says what it reused.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.11.0
DEPS=$PWD/.deps
say() { printf 'deps: %s\n' "$*"; }

# --- Debian packages -------------------------------------------------------------------------------
packages=()
[ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || packages+=(rabbitmq-server)
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || packages+=(postgresql)
command -v cc >/dev/null && command -v c++ >/dev/null || packages+=(build-essential)
command -v unzip >/dev/null || packages+=(unzip)
# The fleet tests give processes wrong clocks.
compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null || packages+=(faketime)
if [ ${#packages[@]} -gt 0 ]; then
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { say "missing: ${packages[*]}; install them as root, or give this user sudo"; exit 1; }
    as_root=(sudo)
  fi
  say "installing ${packages[*]} from Debian"
  # A cluster made and started by the package would only be in the way: the stack starts its own.
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    "${as_root[@]}" mkdir -p /etc/postgresql-common
    echo 'create_main_cluster = false' | "${as_root[@]}" tee /etc/postgresql-common/createcluster.conf >/dev/null
  fi
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
else
  say "reusing RabbitMQ and PostgreSQL"
fi

# --- libtorch from the torch wheel -----------------------------------------------------------------
# On the CPU the wheel needs only libcudart and libcupti beside it; its other CUDA dependencies
# are opened at run time by a worker that is given a GPU, and come with `pip install torch`.
fetch_wheel() { # requirement
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$DEPS/wheels" "$1"
}
if [ "$(cat "$DEPS/libtorch/VERSION" 2>/dev/null)" = "$TORCH_VERSION" ]; then
  say "reusing libtorch $TORCH_VERSION"
else
  say "fetching libtorch $TORCH_VERSION (PyPI's torch wheel, about 0.5 GB)"
  rm -rf "$DEPS/wheels" "$DEPS/libtorch" "$DEPS/unpacked"
  mkdir -p "$DEPS/wheels" "$DEPS/unpacked" "$DEPS/libtorch/lib"
  fetch_wheel "torch==$TORCH_VERSION"
  fetch_wheel "nvidia-cuda-runtime==13.0.96"
  fetch_wheel "nvidia-cuda-cupti==13.0.85"
  unzip -q -o "$DEPS"/wheels/torch-*.whl 'torch/lib/libtorch_cpu.so' 'torch/lib/libc10.so' 'torch/lib/libgomp*' 'torch/include/*' -d "$DEPS/unpacked"
  unzip -q -o "$DEPS"/wheels/nvidia_cuda_runtime-*.whl '*/lib/libcudart.so*' -d "$DEPS/unpacked"
  unzip -q -o "$DEPS"/wheels/nvidia_cuda_cupti-*.whl '*/lib/libcupti.so*' -d "$DEPS/unpacked"
  find "$DEPS/unpacked" -name 'lib*.so*' -exec mv -t "$DEPS/libtorch/lib" {} +
  mv "$DEPS/unpacked/torch/include" "$DEPS/libtorch/include"
  # The wheel's own libtorch.so pulls in libtorch_cuda; this one-line linker script does not, so one
  # binary serves machines with and without a GPU.
  echo 'INPUT(libtorch_cpu.so libc10.so)' >"$DEPS/libtorch/lib/libtorch.so"
  rm -rf "$DEPS/wheels" "$DEPS/unpacked"
  echo "$TORCH_VERSION" >"$DEPS/libtorch/VERSION"
fi

# --- CUDA's headers --------------------------------------------------------------------------------
# For the little that worker/build.rs compiles against libtorch's CUDA half; no CUDA library is needed for it.
cuda_headers="nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88"
if [ "$(cat "$DEPS/cuda-headers/VERSION" 2>/dev/null)" = "$cuda_headers" ]; then
  say "reusing CUDA's headers"
else
  say "fetching CUDA's headers (PyPI's $cuda_headers wheels, 2.4 MB)"
  rm -rf "$DEPS/cuda-headers" "$DEPS/wheels"
  mkdir -p "$DEPS/cuda-headers" "$DEPS/wheels"
  for wheel in $cuda_headers; do fetch_wheel "$wheel"; done
  for wheel in "$DEPS"/wheels/*.whl; do unzip -q -o "$wheel" 'nvidia/cu13/include/*' -d "$DEPS/wheels"; done
  mv "$DEPS/wheels/nvidia/cu13/include" "$DEPS/cuda-headers/include"
  rm -rf "$DEPS/wheels"
  echo "$cuda_headers" >"$DEPS/cuda-headers/VERSION"
  # worker/build.rs watches this file.
  touch "$DEPS/libtorch/VERSION"
fi

# --- CLIP's vocabulary, for the tokenizer's test vectors --------------------------------------------
vocabulary_sha256=924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a
if [ -s "$DEPS/clip/vocab.json" ] && [ -s "$DEPS/clip/merges.txt" ]; then
  say "reusing CLIP's vocabulary"
else
  say "fetching CLIP's vocabulary (PyPI's open_clip_torch wheel, 1.5 MB)"
  mkdir -p "$DEPS/clip" "$DEPS/wheels"
  fetch_wheel "open_clip_torch==3.3.0"
  unzip -q -o -j "$DEPS"/wheels/open_clip_torch-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz -d "$DEPS/wheels"
  echo "$vocabulary_sha256  $DEPS/wheels/bpe_simple_vocab_16e6.txt.gz" | sha256sum --check --quiet
  python3 deploy/clip_vocabulary.py "$DEPS/wheels/bpe_simple_vocab_16e6.txt.gz" "$DEPS/clip"
  rm -rf "$DEPS/wheels"
fi

# --- cuDNN, for the tests that make plans for GPUs that are not here --------------------------------
[ "${1:-}" = --tests ] || exit 0
# The version that the torch wheel asks for.
CUDNN_VERSION=9.19.0.56
if [ "$(cat "$DEPS/cudnn/VERSION" 2>/dev/null)" = "$CUDNN_VERSION" ]; then
  say "reusing cuDNN $CUDNN_VERSION"
else
  say "fetching cuDNN $CUDNN_VERSION (PyPI's nvidia-cudnn-cu13 wheel, 0.4 GB)"
  rm -rf "$DEPS/cudnn" "$DEPS/wheels"
  mkdir -p "$DEPS/cudnn/lib" "$DEPS/wheels"
  fetch_wheel "nvidia-cudnn-cu13==$CUDNN_VERSION"
  # All but the part for recurrent networks and the like.
  unzip -q -o -j "$DEPS"/wheels/nvidia_cudnn_cu13-*.whl 'nvidia/cudnn/lib/*.so.9' -x '*libcudnn_adv*' -d "$DEPS/cudnn/lib"
  rm -rf "$DEPS/wheels"
  echo "$CUDNN_VERSION" >"$DEPS/cudnn/VERSION"
fi
