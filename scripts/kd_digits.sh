#!/usr/bin/env bash
# Distils a classifier of scikit-learn's handwritten digits into two smaller ones: teachers, students on labels alone and
# with the teacher, a learning curve over alpha and temperature. Arguments override the config:
#   scripts/kd_digits.sh labelled=100
. "$(dirname "$0")/_setup" digits,report
diffkd distill configs/digits/classifier.yaml "$@"
