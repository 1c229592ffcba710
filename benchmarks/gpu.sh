#!/usr/bin/env bash
# Checks and measures the project on this machine's accelerator: benchmarks/gpu.sh [arguments of benchmarks/gpu.py]
# benchmarks/gpu.sh throughput [arguments of benchmarks/throughput.py]: training at 28 layers of 7B sizes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
python="${PYTHON:-$python}"
! command -v nvidia-smi >/dev/null || nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv

export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ "${1:-}" = throughput ]; then
  shift
  exec timeout --kill-after=10 900 "$python" benchmarks/throughput.py --device cuda --shape Qwen2.5-Omni-7B --slots 8192 \
    --chunk 2048 --side 420 --large "$@"
fi
exec timeout --kill-after=10 480 "$python" benchmarks/gpu.py "$@" # what is written by then stays
