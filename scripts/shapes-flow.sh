#!/usr/bin/env bash
# A flow from nothing, on captioned shapes of 32x32: trains a whole StableDiffusion3Pipeline without T5, distils it to few steps by four
# methods and measures all on captions that nothing was trained on. Writes runs/shapes-flow-benchmark (the table), and of each run its
# students and a report.html. The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" text,report
diffkd train configs/shapes/flow-teacher.yaml
diffkd cache configs/shapes/flow.yaml
# a run on each of two cores; the teacher by its path, as two runs cannot both hold its own
printf '%s\n' flow flow-meanflow flow-consistency | xargs -P 2 -I NAME sh -c '
  OMP_NUM_THREADS=1 diffkd distill configs/shapes/NAME.yaml "teacher={path: runs/shapes-flow-teacher/teacher}" \
    > runs/shapes-NAME.log 2>&1 || { tail -n 5 runs/shapes-NAME.log >&2; exit 255; }'
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/shapes/flow-benchmark.yaml
