#!/usr/bin/env bash
# Every distillation method on digits at one cost, in one table: each is trained by its config in configs/digits with
# three seeds, one thread a run, as many side by side as there are cores, and every student is measured by two feature
# networks: the one that is reported, and the one that settings were chosen by (scripts/second_features.py). The same
# command goes on where it was stopped. Arguments go to scripts/compare_methods.py, whose --help lists them:
#   scripts/compare_methods.sh --minutes 60               # training stops after an hour; what is finished is measured
#   scripts/compare_methods.sh --seeds 0 --methods progressive dmd2 best
#   scripts/compare_methods.sh --data colour              # 32x32 images in colour, configs/colour
# Writes runs/compare/table.md, results.json and three pictures.
. "$(dirname "$0")/_setup" digits,report
exec python scripts/compare_methods.py "$@"
