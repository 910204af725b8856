#!/usr/bin/env bash
# What only a GPU can tell, in one call: the tests that need one, real-size training and sampling, the miniature's speed.
#   bash benchmarks/on_gpu.sh FOLDER [PART ...]     parts: tests train-sana train-qwen train-fp8 sample speed
# Each part has a time limit and a log of its own in FOLDER; one that fails does not stop the rest.
set -u
folder=${1:?give a folder for logs and results}
shift
parts=${*:-tests train-sana train-qwen train-fp8 sample speed}
python=${PYTHON:-python}
mkdir -p "$folder"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

run() { # name, seconds, command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$folder/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - began)) s"
}

for part in $parts; do
  case $part in
    tests) run tests 120 "$python" -m pytest -n 12 -p no:cacheprovider tests/test_runs_on_gpu.py tests/backbones/test_families_on_gpu.py ;;
    train-sana) run train-sana 100 "$python" benchmarks/real_size.py --cases sana-0.6b sana-1.6b --batches 1 4 8 32 --output "$folder/real-size-sana.json" ;;
    train-qwen) run train-qwen 150 "$python" benchmarks/real_size.py --cases qwen-image-lora-r64 --steps 3 --output "$folder/real-size-qwen.json" ;;
    train-fp8) run train-fp8 60 "$python" benchmarks/real_size.py --cases qwen-image-lora-r64-fp8 --batches 8 --steps 2 --output "$folder/real-size-fp8.json" ;;
    sample) run sample 150 "$python" benchmarks/real_speed.py --output "$folder/real-speed.json" ;;
    speed) run speed 40 "$python" benchmarks/speed.py --output "$folder/speed.json" ;;
    *) echo "unknown part $part" >&2; exit 2 ;;
  esac
done
