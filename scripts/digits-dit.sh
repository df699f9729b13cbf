#!/usr/bin/env bash
# A latent transformer from nothing, on handwritten digits: trains a whole DiTPipeline, distils it to few steps by four methods and
# measures all. Writes runs/digits-dit-benchmark (the table), and of each run its students and a report.html.
# The same command goes on where it was stopped.
. "$(dirname "$0")/_setup" digits,report
. scripts/_distil
diffkd train configs/digits/dit-teacher.yaml
distil digits runs/digits-dit-teacher/teacher dit dit-meanflow dit-consistency
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m diffkd.cli benchmark configs/digits/dit-benchmark.yaml
