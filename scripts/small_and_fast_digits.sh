#!/usr/bin/env bash
# Smaller and faster students on scikit-learn's digits: a deeper teacher, half of it (fewer layers) and a quarter (fewer
# channels), each trained on the teacher's outputs and features at its own steps and then down to one step; and the same
# two networks on the data alone, from the same start and from scratch, with as many updates at the same rate. One table,
# two plots. The two halves run side by side, on a core each, and write to runs/*.log.
. "$(dirname "$0")/_setup" digits,report,quant
config=configs/digits/small-and-fast.yaml
denoising="method={name: denoising, updates: 1500, learning_rate: 1.0e-3}"   # as the feature stage
students() {    # name, how it is made of the teacher; by its path, as two runs cannot both hold the teacher's own
  local common=("teacher={path: runs/digits-deep-teacher/teacher}" "out=runs/digits-$1")
  diffkd distill $config "${common[@]}" "student={$2}"
  diffkd distill $config "${common[@]}-denoising" "student={$2}" "$denoising" pictures=0
  diffkd distill $config "${common[@]}-scratch" "student={$2, weights: random}" "$denoising" pictures=0
}
diffkd train configs/digits/deep-teacher.yaml
export OMP_NUM_THREADS=1
students half 'kind: drop_blocks, blocks: ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1", mid_block]' \
  > runs/digits-half.log 2>&1 & half=$!
students quarter 'kind: narrow, channels: [24, 24]' > runs/digits-quarter.log 2>&1 & quarter=$!
wait $half || { tail -n 5 runs/digits-half.log; exit 1; }
wait $quarter || { tail -n 5 runs/digits-quarter.log; exit 1; }
unset OMP_NUM_THREADS
diffkd benchmark configs/digits/small-benchmark.yaml
