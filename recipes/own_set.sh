#!/usr/bin/env bash
# The set of mini-teacher-six.yaml: 98,304 pictures that the shipped teacher draws itself, with Algorithm 2's ratios; 7 minutes on an H200 by
# 16 processes, some 80 on two cores by two. What is there already is kept.
#   bash recipes/own_set.sh [PROCESSES]
set -eu
processes=${1:-2}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=1 WORLD_SIZE=$processes
mkdir -p runs/captions runs/drawn runs/own
for number in 0 1 2 3 4 5 6 7; do
  # Half of the parts are drawn with fresh noise alone at each step. RANK and WORLD_SIZE share a part without torchrun, on one GPU too.
  [ $((number % 2)) = 0 ] && rho=0.5 || rho=1.0
  captions=runs/captions/own-$number
  [ -d $captions ] || RANK=0 WORLD_SIZE=1 ${PYTHON:-python} -m apexflow data scenes $captions --count 12288 --seed $((20 + number))
  drawing=()
  for ((rank = 0; rank < processes; rank++)); do
    RANK=$rank ${PYTHON:-python} -m apexflow synthesize $captions -o runs/drawn/$number --model mini-teacher --steps 25 --guidance 2.5 \
      --kappa 0.3 --rho $rho --seed $((1 + number)) &
    drawing+=($!)
  done
  for process in "${drawing[@]}"; do wait "$process"; done
  WORLD_SIZE=1 ${PYTHON:-python} -m apexflow cache runs/drawn/$number -o runs/own/$number
done
