# What the scripts here share; to be sourced from the project's root. BINARY, PYTHON, DEVICE and OUT as the environment has them.
BINARY=${BINARY:-target/release/darkroom-worker}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cpu}
OUT=${OUT:-bench/out}
if [[ $DEVICE == cuda* ]]; then
  # Ours opens the CUDA half of the very libtorch that Python has.
  LD_LIBRARY_PATH=$("$PYTHON" -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') || exit 1
  export LD_LIBRARY_PATH
fi
[ -x "$BINARY" ] || { echo "bench: there is no $BINARY; build it first, or set BINARY" >&2; exit 1; }
mkdir -p "$OUT"
