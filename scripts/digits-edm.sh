#!/usr/bin/env bash
# EDM from nothing, on handwritten digits: trains a preconditioned teacher, distils it to few steps by four methods and measures all.
# Writes runs/digits-edm-benchmark (the table), and of each run its students and a report.html.
# The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" digits,report
diffkd train configs/digits/edm-teacher.yaml
# a run on each of two cores; the teacher by its path, as two runs cannot both hold its own
printf '%s\n' edm edm-meanflow edm-consistency | xargs -P 2 -I NAME sh -c '
  OMP_NUM_THREADS=1 diffkd distill configs/digits/NAME.yaml "teacher={path: runs/digits-edm-teacher/teacher}" \
    > runs/digits-NAME.log 2>&1 || { tail -n 5 runs/digits-NAME.log >&2; exit 255; }'
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/digits/edm-benchmark.yaml
