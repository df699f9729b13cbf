#!/usr/bin/env bash
# Smaller and faster students on scikit-learn's digits: a deeper teacher, half of it (fewer layers) and a quarter (fewer
# channels), each trained on the teacher's outputs and features at its own steps and then down to one step; and the same
# two networks on the data alone, from the same start and from scratch, with as many updates at the same rate. One table,
# two plots. The trainings of students run two at a time, on a core each, and write to runs/*.log.
# FID at 64 steps: teacher 0.24, half 0.27 (0.40 by denoising alone, 0.57 from scratch), quarter 0.31 (0.38, 0.78); at 4
# steps half 0.28, quarter 0.30; at 1 step 0.41 and 0.42. Minutes: 28 on two slow cores without AVX-512.
. "$(dirname "$0")/_setup" digits,report,quant
config=configs/digits/small-and-fast.yaml
denoising="method={name: denoising, updates: 600, learning_rate: 4.0e-3}"   # as the feature stage
half='kind: drop_blocks, blocks: ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1", mid_block]'
quarter='kind: narrow, channels: [24, 24]'
distilled() {   # name, how it is made of the teacher; by its path, as two runs cannot both hold the teacher's own
  diffkd distill $config "teacher={path: runs/digits-deep-teacher/teacher}" out="runs/digits-$1" "student={$2}" "${@:3}"
}
alone() { distilled "$1-denoising" "$2" "$denoising" pictures=0; }
scratch() { distilled "$1-scratch" "$2, weights: random" "$denoising" pictures=0; }
diffkd train configs/digits/deep-teacher.yaml
export OMP_NUM_THREADS=1
{ distilled half "$half"; alone half "$half"; } > runs/digits-half.log 2>&1 & first=$!
{ distilled quarter "$quarter"; alone quarter "$quarter"; scratch quarter "$quarter"; scratch half "$half"; } \
  > runs/digits-quarter.log 2>&1 & second=$!
wait $first || { tail -n 5 runs/digits-half.log; exit 1; }
wait $second || { tail -n 5 runs/digits-quarter.log; exit 1; }
unset OMP_NUM_THREADS
diffkd benchmark configs/digits/small-benchmark.yaml
