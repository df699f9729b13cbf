#!/usr/bin/env bash
# Text to image from nothing, on captioned shapes of 32x32: trains a whole StableDiffusionPipeline, distils it to few steps by
# four methods at one cost and to one student for every guidance weight, and measures all on captions that nothing was
# trained on. Writes runs/shapes-benchmark (the table), runs/shapes-guidance-benchmark (curves over the weight), and of each
# run its students and a report.html with the same prompts drawn by teacher and students. About 65 CPU minutes, 36 on two cores.
# The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" text,report
diffkd train configs/shapes/teacher.yaml
diffkd cache configs/shapes/progressive.yaml
export OMP_NUM_THREADS=1
distil() {  # the teacher by its path, as two runs cannot both hold its own
    diffkd distill "configs/shapes/$1.yaml" "teacher={path: runs/shapes-teacher/teacher}" &&
        { [ "$1" != guidance ] || diffkd benchmark configs/shapes/guidance-benchmark.yaml; }
}
logged() {
    distil "$1" > "runs/shapes-$1.log" 2>&1 || { tail -n 5 "runs/shapes-$1.log" >&2; exit 255; }
}
export -f distil logged
printf '%s\n' guidance progressive lcm dmd2 best | xargs -P 2 -I NAME bash -c 'logged NAME'  # one on each of two cores
torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/shapes/benchmark.yaml
