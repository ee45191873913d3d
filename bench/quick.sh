#!/usr/bin/env bash
# The first look at a GPU that is lent for minutes: is what it draws right, does a picture depend on its company, how fast is it with
# CUDA graphs and without, and with decoding beside denoising. No network, and nothing but the built binary and a Python with torch's wheel, whose libraries it opens.
#
#   DEVICE=cuda bench/quick.sh            full size; ends by itself after BUDGET seconds (460), the most telling parts first
#   bench/quick.sh                        the same on a CPU with the smallest model, to see that it runs
#
# BINARY, PYTHON and OUT are as in bench/run.sh; a binary that has to travel is a sixth of its size after `strip`. Results: OUT/quick-*.json, one line each; what was left out is said.
set -uo pipefail
cd "$(dirname "$0")/.."

. bench/settings.sh
BUDGET=${BUDGET:-460}
if [[ $DEVICE == cuda* ]]; then
  SIZE=${SIZE:-full} CHECK_SIZE=${CHECK_SIZE:-small} STEPS=${STEPS:-50} DTYPE=${DTYPE:-f16} BATCH_SIZES=${BATCH_SIZES:-33,8,1} COMPANY=${COMPANY:-8}
else
  SIZE=${SIZE:-tiny} CHECK_SIZE=${CHECK_SIZE:-tiny} STEPS=${STEPS:-5} DTYPE=${DTYPE:-f32} BATCH_SIZES=${BATCH_SIZES:-2,1} COMPANY=${COMPANY:-3}
fi

failed=0
# A part: its name, the seconds it may take at most, and the options of `bench`. Cut to what is left of the budget.
part() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS))
  shift 2
  if [ "$left" -lt 20 ]; then echo "quick: $name left out, $SECONDS s are over"; failed=1; return; fi
  [ "$limit" -le "$left" ] || limit=$left
  if timeout "$limit" "$BINARY" --log warn bench --json "$@" >"$OUT/quick-$name.json" 2>"$OUT/quick-$name.log"; then
    echo "quick: $name ($SECONDS s): $(cut -c1-600 "$OUT/quick-$name.json" | tail -n 3)"
  else
    failed=1
    echo "quick: $name FAILED ($SECONDS s): $(tail -n 3 "$OUT/quick-$name.log" "$OUT/quick-$name.json")"
  fi
}
small=(--size "$CHECK_SIZE" --num-inference-steps 6 --batch-sizes 2 --warmup 0 --repeats 1)
full=(--size "$SIZE" --device "$DEVICE" --dtypes "$DTYPE" --num-inference-steps "$STEPS")

# 1. Is it right? The same small model and pictures on the CPU, alone and in f32, are the reference; the reports say how far off
#    the final latents are: about 1e-5 in f32, in 16 bits as far as six steps amplify rounding.
part reference 90 "${small[@]}" --outputs "$OUT/quick-reference.safetensors"
for dtype in f32 "$DTYPE"; do
  part "right-$dtype" 60 "${small[@]}" --device "$DEVICE" --dtypes "$dtype" --pad-batch 3 \
    --reference "$OUT/quick-reference.safetensors"
done
# 2. P8, without graphs and with, decoded after its own call and beside the next: one job in every place of a batch.
part company-small 60 --check-company --size "$CHECK_SIZE" --device "$DEVICE" --dtypes "$DTYPE" --batch-sizes "$COMPANY" \
  --num-inference-steps 6 --graph off,on --overlap-decode off,on
# 3. How fast, stage by stage, calls with and without graphs in turn, the largest batch first.
part speed 240 "${full[@]}" --batch-sizes "$BATCH_SIZES" --graph off,on --warmup 1 --repeats 3
# 4. What decoding beside denoising brings, over calls in a row.
part overlap 120 "${full[@]}" --batch-sizes "${BATCH_SIZES%%,*}" --graph on --overlap-decode off,on --in-a-row 3 \
  --warmup 1 --repeats 1
# 5. P8 at full size.
part company-full 90 --check-company --size "$SIZE" --device "$DEVICE" --dtypes "$DTYPE" --batch-sizes "$COMPANY" \
  --num-inference-steps 6 --graph on --overlap-decode on
# 6. Which kernel of attention: 10 steps are enough. `own` is ours, for heads of 40 and 80 values; the reports name the kernels that were
#    really used, and ours is not where it failed the check at loading. Then whether pictures by it are right, and alike in company.
if [[ $DEVICE == cuda* ]]; then
  for kernel in own cudnn flash; do
    if [ "$kernel" = own ]; then choice=(--kernels attention); else choice=(--attention "$kernel"); fi
    part "attention-$kernel" 60 --size "$SIZE" --device "$DEVICE" --dtypes "$DTYPE" --num-inference-steps 10 \
      --batch-sizes "${BATCH_SIZES%%,*}" "${choice[@]}" --warmup 1 --repeats 2
  done
  part "right-$DTYPE-attention" 60 "${small[@]}" --device "$DEVICE" --dtypes "$DTYPE" --pad-batch 3 --kernels attention \
    --reference "$OUT/quick-reference.safetensors"
  part company-attention 60 --check-company --size "$CHECK_SIZE" --device "$DEVICE" --dtypes "$DTYPE" --batch-sizes "$COMPANY" \
    --num-inference-steps 6 --graph on --kernels attention
fi
# 7. Which of cuDNN's engines, for the largest batch: find them, then see that pictures by them are right, alike in company, and how fast.
if [[ $DEVICE == cuda* ]]; then
  engines=$OUT/quick-engines.json left=$((BUDGET - SECONDS))
  if [ "$left" -ge 60 ] && timeout "$left" "$BINARY" --log warn tune --size "$SIZE" --device "$DEVICE" --dtype "$DTYPE" \
    --pad-batch "${BATCH_SIZES%%,*}" --output "$engines" >"$OUT/quick-tune.txt" 2>"$OUT/quick-tune.log"; then
    echo "quick: tune ($SECONDS s): $(tail -n 1 "$OUT/quick-tune.txt")"
    part convolutions 60 --size "$SIZE" --device "$DEVICE" --dtypes "$DTYPE" --num-inference-steps 10 \
      --batch-sizes "${BATCH_SIZES%%,*}" --pad-batch "${BATCH_SIZES%%,*}" --graph on --convolutions "$engines" --warmup 1 --repeats 2
    part company-convolutions 60 --check-company --size "$SIZE" --device "$DEVICE" --dtypes "$DTYPE" \
      --batch-sizes "${BATCH_SIZES%%,*}" --num-inference-steps 6 --graph on --convolutions "$engines"
  else
    echo "quick: tune left out or FAILED ($SECONDS s): $(tail -n 3 "$OUT/quick-tune.log" 2>/dev/null)"
    failed=1
  fi
  small_engines=$OUT/quick-engines-small.json
  if [ $((BUDGET - SECONDS)) -ge 60 ] && timeout 60 "$BINARY" --log warn tune --size "$CHECK_SIZE" --device "$DEVICE" --dtype "$DTYPE" \
    --pad-batch 3 --output "$small_engines" >"$OUT/quick-tune-small.txt" 2>&1; then
    part "right-$DTYPE-convolutions" 60 "${small[@]}" --device "$DEVICE" --dtypes "$DTYPE" --pad-batch 3 \
      --convolutions "$small_engines" --reference "$OUT/quick-reference.safetensors"
  fi
fi
exit $failed
