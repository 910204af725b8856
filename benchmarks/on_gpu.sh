#!/usr/bin/env bash
# What only a GPU can tell, in one call: the tests that need one, real-size training and sampling, the miniature's speed.
#   bash benchmarks/on_gpu.sh FOLDER [PART ...]
# Parts: tests sana qwen narrow families sample speed; all of them by default. Each has a time limit, one that fails does not stop the
# rest, and FOLDER gets log.txt and a JSON file of each part that measures. Without apexflow installed, start it in the repository's root.
set -u
failed=0
folder=${1:?give a folder for results}
shift
parts=${*:-tests sana qwen narrow families sample speed}
python=${PYTHON:-python}
mkdir -p "$folder"
export APEXFLOW_TESTS_ON_GPU=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

run() { # name, seconds, arguments of python
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  echo "== $name" >>"$folder/log.txt"
  timeout "$limit" "$python" "$@" >>"$folder/log.txt" 2>&1
  local code=$?
  echo "$name: exit $code after $((SECONDS - began)) s"
  [ $code = 0 ] || failed=1
}
train() { # name, seconds, arguments of real_size.py
  run "$1" "$2" benchmarks/real_size.py --output "$folder/real-size-$1.json" "${@:3}"
}

for part in $parts; do
  case $part in
    tests) run tests 240 -m pytest -n 12 -p no:cacheprovider tests/test_runs_on_gpu.py tests/backbones/test_families_on_gpu.py ;;
    sana) train sana 120 --cases sana-0.6b sana-1.6b --batches 1 4 8 32 ;;
    qwen) train qwen 200 --cases qwen-image-lora-r64 --steps 2 ;;
    narrow) train narrow 200 --cases qwen-image-lora-r64-fp8 qwen-image-lora-r32-nf4 sana-1.6b-adamw8bit --batches 2 8 --steps 2 --methods apex ;;
    families) train families 200 --batches 4 --steps 1 --methods apex --cases flux-dev-lora-r64 flux2-klein-4b-lora-r64 z-image-lora-r64 \
      sd3.5-large-lora-r64 lumina2-lora-r64 sdxl-lora-r64 pixart-lora-r64 ;;
    sample) run sample 400 benchmarks/real_speed.py --output "$folder/real-speed.json" ;;
    speed) run speed 60 benchmarks/speed.py --output "$folder/speed.json" ;;
    *)
      echo "unknown part $part" >&2
      exit 2
      ;;
  esac
done
exit $failed
