#!/usr/bin/env bash
# The lowest versions that pyproject.toml allows, in a venv of their own: import, dry run, training of two steps, tests.
#   benchmarks/lowest.sh [--quick]     --quick: without the tests
# Installed again when pyproject.toml has changed. Direct dependencies only; theirs are the newest that fit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" HF_HUB_OFFLINE=1
venv=$PWD/.venv-lowest
wanted=$(cksum <pyproject.toml)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install -q uv
    VIRTUAL_ENV=$venv "$venv/bin/uv" pip install -q --resolution lowest-direct -e '.[all,test]'
    echo "$wanted" >"$venv/installed"
fi
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH

python - <<'PY'
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

table = tomllib.loads(Path("pyproject.toml").read_text())["project"]
named = [*table["dependencies"], *(each for extra in table["optional-dependencies"].values() for each in extra)]
for name, lowest in (match.groups() for each in named if (match := re.match(r"([\w-]+)>=([\d.]+)", each))):
    try:
        print(f"{name} {version(name)} (lowest: {lowest})")
    except ModuleNotFoundError:
        continue
PY
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
here=$PWD
(
    cd "$folder"
    python "$here/data_prep/synthesize.py" --out data/recall --train 4 --calibration 1 --test 1 --seconds 16 >/dev/null
    few=(evaluate.after_training=false train.max_steps=2 train.per_device_train_batch_size=1 calibration.streams=2
        calibration.skip_chunks=0)
    python "$here/train/finetune.py" --config tiny.yaml --dry-run >/dev/null
    python "$here/train/finetune.py" --config tiny.yaml name=plain train.deepspeed=null "${few[@]}"
    python "$here/train/finetune.py" --config tiny.yaml name=engine train.deepspeed=deepspeed/zero2.json \
        model.dtype=bfloat16 train.bf16=true "${few[@]}"
)
[ "${1:-}" = --quick ] && exit
# old versions warn about newer ones that they use: no error here
python -m pytest -q -p no:cacheprovider -W default tests/unit -m "not slow" -n 2 --dist loadfile
