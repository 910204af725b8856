#!/usr/bin/env bash
# What of the miniature is made on a GPU, in one call: a set that the shipped teacher draws of itself, and teachers of it.
#   bash recipes/mini_on_gpu.sh FOLDER [PART ...]
# Parts: set teacher scores; all of them by default. FOLDER gets log.txt, the scores as JSON, and the models in pieces of 15 MB:
#   cat FOLDER/models.tgz.* | tar xz
# MINUTES=3 ends a training after three, where a machine is lent.
set -u
folder=${1:?give a folder for results}
shift
parts=${*:-set teacher scores}
python=${PYTHON:-python3}
mkdir -p "$folder" runs/captions runs/drawn runs/own
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
apexflow() { "$python" -m apexflow "$@"; }

own_set() { # number: captions, pictures of them, and their latents. Half of the sets are drawn with fresh noise throughout
  local rho=0.5
  [ $(($1 % 2)) = 1 ] && rho=1.0
  apexflow data scenes "runs/captions/$1" --count 12288 --seed $((20 + $1)) || return
  for rank in 0 1; do
    RANK=$rank WORLD_SIZE=2 LOCAL_RANK=0 apexflow synthesize "runs/captions/$1" -o "runs/drawn/$1" --model mini-teacher \
      --steps 25 --guidance 2.5 --kappa 0.3 --rho $rho --seed $((1 + $1)) &
  done
  wait
  apexflow cache "runs/drawn/$1" -o "runs/own/$1"
}

for part in $parts; do
  began=$SECONDS
  case $part in
    set)
      for number in 0 1 2 3 4 5 6 7; do own_set $number >"runs/own-$number.log" 2>&1 & done
      "$python" recipes/deepen.py mini-teacher -o runs/mini-teacher-twelve-start --after 0 1 2 3 4 5
      wait
      tail -n 2 runs/own-*.log
      ;;
    teacher)
      for recipe in mini-teacher-twelve mini-teacher-six; do
        apexflow train "recipes/$recipe.yaml" ${MINUTES:+minutes=$MINUTES} >"runs/$recipe.log" 2>&1 &
      done
      wait
      tail -n 3 runs/mini-teacher-*.log
      tar cz runs/mini-teacher-twelve/model runs/mini-teacher-six/model | split -b 15M - "$folder/models.tgz."
      ;;
    scores)
      for teacher in mini-teacher-twelve mini-teacher-six; do
        for guidance in 1 1.5 2 2.5; do
          apexflow evaluate --model runs/$teacher/model --steps 25 --guidance $guidance --seed 30 --json \
            >"runs/$teacher-$guidance.json" 2>>"$folder/log.txt" &
        done
      done
      wait
      "$python" - <<'PYTHON'
import json, pathlib
for path in sorted(pathlib.Path("runs").glob("mini-teacher-*.json")):
    try:
        print(path.stem, json.loads(path.read_text()).get("overall"))
    except ValueError as error:
        print(path.stem, error)
PYTHON
      cat runs/mini-teacher-*.json >"$folder/scores.json"
      ;;
    *)
      echo "unknown part $part" >&2
      exit 2
      ;;
  esac
  echo "$part: $((SECONDS - began)) s"
done
