#!/usr/bin/env bash
# Measures the model on this machine, first alone, then beside diffusers. No network: the weights are drawn here.
#
#   bench/run.sh                          CPU, tiny and small models: what `make bench` runs
#   SIZES=full STEPS=1 bench/run.sh       one full-size step on the CPU
#   DEVICE=cuda bench/run.sh              a GPU: full size, 50 steps, f16 and bf16, batch sizes 1 to 66, with our own
#                                         kernels, with our own attention too, and without (KERNELS), and calls in a
#                                         row, decoded beside the next or after one another (ROW of them,
#                                         OVERLAP_BATCH_SIZES), and with the engines of cuDNN that `tune` finds for
#                                         TUNED_BATCH_SIZES
#
# Needs the built binary (BINARY, or target/release) and a Python with worker/tests/golden/requirements.txt and psutil
# (PYTHON). On a GPU machine the wheels' own libraries serve our binary too: see worker/src/diffusion/device.rs.
# Results: bench/out/*.json (OUT).
set -euo pipefail
cd "$(dirname "$0")/.."

. bench/settings.sh
MODELS=${MODELS:-$OUT/models}
if [[ $DEVICE == cuda* ]]; then
  SIZES=${SIZES:-full} STEPS=${STEPS:-50} DTYPES=${DTYPES:-f16,bf16} ROUNDS=${ROUNDS:-5}
  BATCH_SIZES=${BATCH_SIZES:-1,4,8,16,32,33,64,66} KERNELS=${KERNELS:-fused attention plain}
  ROW=${ROW:-4} OVERLAP_BATCH_SIZES=${OVERLAP_BATCH_SIZES:-33,8} TUNED_BATCH_SIZES=${TUNED_BATCH_SIZES:-8,33}
  # Clocks, power and memory of the whole time, to tell a throttled run from a good one.
  nvidia-smi --query-gpu=timestamp,name,driver_version,clocks.sm,power.draw,temperature.gpu,memory.used \
    --format=csv --loop=1 >"$OUT/gpu.csv" &
  trap 'kill $!' EXIT
else
  SIZES=${SIZES:-tiny small} STEPS=${STEPS:-10} DTYPES=${DTYPES:-f32} ROUNDS=${ROUNDS:-5} BATCH_SIZES=${BATCH_SIZES:-1}
  # Two calls in a row, once: that it works is all that a CPU can show, whose cores the two halves share.
  KERNELS=plain ROW=${ROW:-2} OVERLAP_BATCH_SIZES=${OVERLAP_BATCH_SIZES:-1} OVERLAP_ROUNDS=${OVERLAP_ROUNDS:-1}
fi
mkdir -p "$MODELS"

for size in $SIZES; do
  for kernels in $KERNELS; do
    "$BINARY" --log warn bench --size "$size" --device "$DEVICE" --dtypes "$DTYPES" --batch-sizes "$BATCH_SIZES" \
      --num-inference-steps "$STEPS" --repeats "$ROUNDS" --kernels "$kernels" --json >"$OUT/$size-$DEVICE-$kernels.json"
    echo "bench: wrote $OUT/$size-$DEVICE-$kernels.json"
  done
  if [[ $DEVICE == cuda* ]]; then
    # With the engines of cuDNN that are fastest here, each dtype's and batch size's own.
    for dtype in ${DTYPES//,/ }; do
      for batch_size in ${TUNED_BATCH_SIZES//,/ }; do
        name=$size-$DEVICE-$dtype-$batch_size
        "$BINARY" --log warn tune --size "$size" --device "$DEVICE" --dtype "$dtype" --pad-batch "$batch_size" \
          --output "$OUT/engines-$name.json" | tee "$OUT/engines-$name.txt" | tail -n 1
        "$BINARY" --log warn bench --size "$size" --device "$DEVICE" --dtypes "$dtype" --batch-sizes "$batch_size" \
          --pad-batch "$batch_size" --num-inference-steps "$STEPS" --repeats "$ROUNDS" --graph off,on \
          --convolutions "$OUT/engines-$name.json" --json >"$OUT/convolutions-$name.json"
        echo "bench: wrote $OUT/convolutions-$name.json"
      done
    done
  fi
  "$BINARY" --log warn bench --size "$size" --device "$DEVICE" --dtypes "${DTYPES%%,*}" --batch-sizes "$OVERLAP_BATCH_SIZES" \
    --num-inference-steps "$STEPS" --repeats "${OVERLAP_ROUNDS:-$ROUNDS}" --overlap-decode off,on --in-a-row "$ROW" \
    --json >"$OUT/$size-$DEVICE-overlap.json"
  echo "bench: wrote $OUT/$size-$DEVICE-overlap.json"
  "$PYTHON" -c 'import diffusers' 2>/dev/null || { echo "bench: $PYTHON has no diffusers, nothing to compare with"; continue; }
  for dtype in ${DTYPES//,/ }; do
    for batch_size in ${BATCH_SIZES//,/ }; do
      echo "bench: $size, $dtype, batch size $batch_size"
      "$PYTHON" bench/compare.py --binary "$BINARY" --model "$MODELS/$size" --size "$size" --device "$DEVICE" \
        --dtype "$dtype" --batch-size "$batch_size" --steps "$STEPS" --rounds "$ROUNDS" \
        --json "$OUT/compare-$size-$DEVICE-$dtype-$batch_size.json"
    done
  done
done
