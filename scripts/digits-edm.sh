#!/usr/bin/env bash
# EDM from nothing, on handwritten digits: trains a preconditioned teacher, distils it to few steps by four methods and measures all.
# Writes runs/digits-edm-benchmark (the table), and of each run its students and a report.html.
# The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" digits,report
. scripts/_distil
diffkd train configs/digits/edm-teacher.yaml
distil digits runs/digits-edm-teacher/teacher edm edm-meanflow edm-consistency
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/digits/edm-benchmark.yaml
