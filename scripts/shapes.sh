#!/usr/bin/env bash
# Text to image from nothing, on captioned shapes of 32x32: trains a whole StableDiffusionPipeline, distils it to few steps by
# four methods at one cost and to one student for every guidance weight, and measures all on captions that nothing was
# trained on. Writes runs/shapes-benchmark (the table), runs/shapes-guidance-benchmark (curves over the weight), and of each
# run its students and a report.html with the same prompts drawn by teacher and students. About 75 CPU minutes.
# The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" text,report
diffkd train configs/shapes/teacher.yaml
diffkd cache configs/shapes/progressive.yaml
# a run on each of two cores; the teacher by its path, as two runs cannot both hold its own
printf '%s\n' guidance progressive lcm dmd2 best | xargs -P 2 -I NAME sh -c '
  OMP_NUM_THREADS=1 diffkd distill configs/shapes/NAME.yaml "teacher={path: runs/shapes-teacher/teacher}" \
    > runs/shapes-NAME.log 2>&1 || { tail -n 5 runs/shapes-NAME.log >&2; exit 255; }'
for benchmark in benchmark guidance-benchmark; do
  OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/shapes/$benchmark.yaml
done
