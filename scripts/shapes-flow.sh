#!/usr/bin/env bash
# A flow from nothing, on captioned shapes of 32x32: trains a whole StableDiffusion3Pipeline without T5, distils it to few steps by four
# methods and measures all on captions that nothing was trained on. Writes runs/shapes-flow-benchmark (the table), and of each run its
# students and a report.html. The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" text,report
. scripts/_distil
diffkd train configs/shapes/flow-teacher.yaml
diffkd cache configs/shapes/flow.yaml
distil shapes runs/shapes-flow-teacher/teacher flow flow-meanflow flow-consistency
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/shapes/flow-benchmark.yaml
