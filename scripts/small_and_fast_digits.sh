#!/usr/bin/env bash
# Smaller and faster students on scikit-learn's digits: a deeper teacher, half of it (fewer layers) and a quarter (fewer
# channels), each trained on the teacher's outputs and features at its own steps and then down to one step. One table,
# two plots. The two students are trained side by side, on a core each, and write to runs/*.log.
#   scripts/small_and_fast_digits.sh              # FID at 64 / 4 / 1 steps: teacher 0.24 / 1.04 / 13.3,
#                                                 # half 0.27 / 0.28 / 0.41, quarter 0.31 / 0.30 / 0.42
#   scripts/small_and_fast_digits.sh baselines    # also the same networks on the data alone, with as many updates at the
#                                                 # same rate: from the same start 0.40 and 0.38, from scratch 0.57 and 0.78
# Minutes on two cores: 10, and 18 with the baselines; 20 and about 30 without AVX-512.
case "${1:-}" in '' | baselines) ;; *) echo "unknown argument $1; use baselines, or none" >&2; exit 2 ;; esac
. "$(dirname "$0")/_setup" digits,report,quant
half='kind: drop_blocks, blocks: ["down_blocks.*.resnets.1", "up_blocks.*.resnets.1", mid_block]'
quarter='kind: narrow, channels: [24, 24]'
denoising="method={name: denoising, updates: 600, learning_rate: 4.0e-3}"   # as the feature stage
distilled() {   # name, how it is made of the teacher; by its path, as two runs cannot both hold the teacher's own
  diffkd distill configs/digits/small-and-fast.yaml "teacher={path: runs/digits-deep-teacher/teacher}" \
    out="runs/digits-$1" "student={$2}" "${@:3}"
}
baselines() {
  distilled "$1-denoising" "$2" "$denoising" pictures=0
  distilled "$1-scratch" "$2, weights: random" "$denoising" pictures=0
}
side_by_side() {    # a function of name and student, for both students
  OMP_NUM_THREADS=1 "$1" half "$half" > "runs/digits-half-$1.log" 2>&1 & local first=$!
  OMP_NUM_THREADS=1 "$1" quarter "$quarter" > "runs/digits-quarter-$1.log" 2>&1 & local second=$!
  wait $first || { tail -n 5 "runs/digits-half-$1.log"; pkill -P $second; exit 1; }
  wait $second || { tail -n 5 "runs/digits-quarter-$1.log"; exit 1; }
}
diffkd train configs/digits/deep-teacher.yaml
side_by_side distilled
diffkd benchmark configs/digits/small-benchmark.yaml
if [ -n "${1:-}" ]; then
  side_by_side baselines
  diffkd benchmark configs/digits/small-baselines.yaml
fi
