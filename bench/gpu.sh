#!/usr/bin/env bash
# Everything there is to check on a machine with a GPU, in less than ten minutes:
#
#     bench/gpu.sh [--install] [--pack] [FOLDER]
#
# Reports go to FOLDER (default: $OUT, or else bench/results/gpu), what each check said to FOLDER/logs. A check that
# fails does not keep the others from running. A table of all is printed last, and kept as FOLDER/table.txt.
#
#     --install   first install mpicoll, and what the checks need, into the environment of $PYTHON
#     --pack      put all but the table into FOLDER/gpu.tar.gz: for machines that hand back few files
#     PYTHON      the Python to use (default: python3)
#     LIMIT       seconds for all checks together (default: 570); none begins in the last $LEAST (default: 10)
#
# Status: 0 if nothing failed, also where checks were skipped, so also without a GPU; 1 if any check failed;
# 2 if none could be tried. The GPU's clocks, modes and limits stay as they are.
set -u

usage() { sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"; }

install='' pack='' folder=''
for argument; do
    case $argument in
        --install) install=yes ;;
        --pack) pack=yes ;;
        -h | --help) usage; exit 0 ;;
        -*) echo "gpu.sh: expected --install, --pack or a folder, got $argument" >&2; exit 2 ;;
        *) folder=$argument ;;
    esac
done
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${folder:-${OUT:-$root/bench/results/gpu}}
python=${PYTHON:-python3}
end=$((SECONDS + ${LIMIT:-570}))
mkdir -p "$folder" || exit 2
folder=$(cd "$folder" && pwd)
if [[ $pack ]]; then
    into=$(mktemp -d) || exit 2
    trap 'rm -rf "$into"' EXIT
else
    into=${folder#"$root/"} # reports name it, in their commands
fi
cd "$root" && mkdir -p "$into/logs" || exit 2

if [[ $install ]]; then
    "$python" -m pip install --quiet --editable '.[openmpi,train,test,cuda]' || exit 2
fi
if ! "$python" -c 'import mpicoll.bench, mpicoll.kernels' 2>"$into/logs/import.log"; then
    tail -n 1 "$into/logs/import.log" >&2
    echo "gpu.sh: $python has no mpicoll: bench/gpu.sh --install, or PYTHON=... bench/gpu.sh" >&2
    exit 2
fi

# -- how checks are run

rows=() failed=0

report() { # NAME RESULT [SECONDS]
    local row
    printf -v row '%-24s %5s  %s' "$1" "${3:-}" "$2"
    rows+=("$row")
    echo "   $2"
    [[ $2 != FAILED* ]] || failed=1
}

amend() { # NAME RESULT: of the check that was reported last
    unset 'rows[-1]'
    report "$@"
}

skip() { # NAME REASON
    echo "== $1"
    report "$1" "skipped: $2"
}

# Runs a command for at most so many seconds. What it says goes to a log, its standard output to $to if that is set.
check() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS log=$into/logs/${1//[^A-Za-z0-9]/-}.log
    shift 2
    if ((end - SECONDS < ${LEAST:-10})); then
        skip "$name" 'no time is left'
        return 1
    fi
    ((limit <= end - SECONDS)) || limit=$((end - SECONDS))
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" >"${to:-$log}" 2>>"$log" </dev/null
    local status=$?
    case $status in
        0)
            report "$name" ok $((SECONDS - begin))
            return 0
            ;;
        124 | 137) report "$name" "FAILED: not done after $limit s" $((SECONDS - begin)) ;;
        *) report "$name" "FAILED: status $status" $((SECONDS - begin)) ;;
    esac
    tail -n 15 "$log"
    return 1
}

# The same, where there is a GPU and everything in $needs.
on_gpu() { # NAME SECONDS COMMAND...
    local package
    if [[ $no_gpu ]]; then
        skip "$1" "$no_gpu"
        return 1
    fi
    for package in ${needs:-cupy numba_cuda}; do
        if ! has "$package"; then
            skip "$1" "$package is not installed"
            return 1
        fi
    done
    check "$@"
}

has() { [[ $modules == *" $1 "* ]]; }

# Sets line to the command that runs a module on so many ranks, with $aware for the launcher.
ranks() { # NUMBER MODULE [ARGUMENT ...]
    local number=$1
    shift
    line=("$python" -m mpicoll.launch -np "$number" ${aware:+"$aware"} "$python" -m "$@")
}

# -- what reports say

# Of an MPI library, whether it takes GPU memory, and why: yes, no, or unknown.
verdict() { # FILE
    "$python" - "$1" <<'END'
import json, sys
found = json.load(open(sys.argv[1]))["cuda_aware"]
print({True: "yes", False: "no", None: "unknown"}[found["aware"]] + ":", found["how"])
END
}

# Whether a contender has a row in a report of collectives; if it has none, why.
took_part() { # NAME FILE
    "$python" - "$@" <<'END'
import json, sys
name, file = sys.argv[1:]
report = json.load(open(file))
if not any(row["by"] == name for row in report["results"]):
    sys.exit(next((text for text in report["left_out"] if text.startswith(name)), "no result"))
END
}

ipc() { # FILE
    "$python" - "$1" <<'END'
import json, sys
print(json.load(open(sys.argv[1]))["ipc"])
END
}

# -- what is here

modules=$("$python" - <<'END'
from importlib.util import find_spec
names = "cupy numba_cuda pytest xdist torch safetensors sklearn libucx".split()
print("", *(name for name in names if find_spec(name)), "")
END
)
no_gpu=$("$python" - <<'END'
from mpicoll.info import visible_gpus
gpus, looked_for = visible_gpus()
print("" if gpus else f"no GPU: {looked_for}")
END
)
if [[ $no_gpu ]]; then
    echo "$no_gpu"
    no_gpu='no GPU'
fi
aware='' to='' needs=''

# -- facts

ranks 2 mpicoll info --json
to=$into/info.json check 'info' 60 "${line[@]}"
ranks 2 mpicoll.bench.gpu_facts --json "$into/facts.json"
if on_gpu 'facts' 90 "${line[@]}"; then
    sharing=$(ipc "$into/facts.json")
    report 'IPC' "${sharing:-FAILED: no answer}"
fi

# -- MPI libraries: those of wheels are not CUDA-aware by themselves, Open MPI's is on another UCX

if [[ $no_gpu ]]; then
    skip 'plain MPI' "$no_gpu"
else
    plain=$(verdict "$into/info.json")
    echo "== plain MPI: is it CUDA-aware? $plain"
    case $plain in
        no:* | yes:*) report 'plain MPI' "CUDA-aware: ${plain%%:*}" ;;
        *) report 'plain MPI' 'FAILED: whether it is CUDA-aware is unknown' ;;
    esac
fi
if [[ $no_gpu ]] || ! has libucx; then
    skip 'MPI with --cuda-aware' "${no_gpu:-libucx is not installed: pip install 'mpicoll[openmpi-cuda]'}"
else
    aware=--cuda-aware ranks 2 mpicoll info --json
    if to=$into/info-cuda-aware.json check 'MPI with --cuda-aware' 90 "${line[@]}"; then
        with_ucx=$(verdict "$into/info-cuda-aware.json")
        echo "== MPI with --cuda-aware: is it? $with_ucx"
        case $with_ucx in
            yes:*) aware=--cuda-aware ;;
            *) amend 'MPI with --cuda-aware' "FAILED: CUDA-aware: ${with_ucx%%:*}" ;;
        esac
    fi
fi

# -- kernels beside their twins on the CPU

cases=("$python" -m pytest -q -p no:cacheprovider -W ignore::RuntimeWarning tests/unit/cuda_cases.py)
workers=()
if has xdist; then workers=(-n 8); fi
needs='cupy numba_cuda pytest' on_gpu 'kernels: twins' 150 "${cases[@]}" ${workers[@]+"${workers[@]}"}

# -- collectives on GPU memory: whether they are right, then how fast they are

collectives=mpicoll.bench.gpu_collectives
everything=(--collectives all --types all --ops all --max 1M --factor 61 --turns 0 --limit 45)
aware='' ranks 3 $collectives "${everything[@]}" --transports ipc,staged --json "$into/right-3.json"
on_gpu 'collectives: right' 75 "${line[@]}"
if [[ $aware ]]; then
    ranks 3 $collectives "${everything[@]}" --transports messages --json "$into/right-messages-3.json"
    on_gpu 'messages: right' 75 "${line[@]}"
else
    skip 'messages: right' "${no_gpu:-no CUDA-aware MPI}"
fi

# Others may crash, or wait for ever: that is no failure of ours, and only who has passed a trial is measured with us.
others=copied
for name in native nccl gloo; do
    trial=$into/logs/peer-$name.json before=$failed
    ranks 2 $collectives --transports '' --compare $name --max 4K --turns 1 --copied 64M --json "$trial"
    if on_gpu "peer: $name" 40 "${line[@]}"; then
        if why=$(took_part $name "$trial" 2>&1); then
            others+=,$name
        else
            amend "peer: $name" "skipped: $why"
        fi
    elif [[ ${rows[-1]} == *FAILED:* ]]; then
        amend "peer: $name" "skipped: its trial failed,${rows[-1]#*FAILED:}"
        failed=$before
    fi
done
for number in 2 4 8; do
    ranks $number $collectives --compare "$others" --limit 45 --json "$into/collectives-$number.json"
    on_gpu "collectives: $number ranks" 75 "${line[@]}"
done

# -- kernels: how fast they are

for list in resnet50 gpt2 big many; do
    on_gpu "kernels: $list" 45 "$python" -m mpicoll bench kernels --device cuda --list $list \
        --json "$into/kernels-$list.json"
done

# -- training

if "$python" -m mpicoll bench gradients --help 2>/dev/null | grep -q -- --device; then
    ranks 2 mpicoll bench gradients --device cuda --json "$into/gradients-2.json"
    on_gpu 'gradients: 2 ranks' 60 "${line[@]}"
else
    skip 'gradients: 2 ranks' 'mpicoll bench gradients has no --device'
fi
needs='cupy safetensors sklearn' on_gpu 'training' 120 \
    "$python" -m mpicoll.bench.gpu_training --ranks 1,2,4 --json "$into/training.json"
skip 'PyTorch: DDP' 'nothing measures it yet'

# -- what kernels do to memory; last, for it is slow

some='test_copies and float32 or test_fold and SUM-float32 or test_update_at or check_select_at or check_halves'
for tool in memcheck racecheck; do
    if command -v compute-sanitizer >/dev/null; then
        needs='cupy numba_cuda pytest' on_gpu "kernels: $tool" 90 \
            compute-sanitizer --tool $tool --error-exitcode 9 "${cases[@]}" -k "$some"
    else
        skip "kernels: $tool" "${no_gpu:-compute-sanitizer is not installed}"
    fi
done

# -- the table

{
    printf '%-24s %5s  %s\n' check s result
    printf '%s\n' "${rows[@]}"
} >"$folder/table.txt"
for file in "$into"/*.json; do # which say how they were made: for where they are kept
    sed -i "s|$into/|bench/results/gpu/|g" "$file"
done
if [[ $pack ]]; then tar -czf "$folder/gpu.tar.gz" -C "$into" .; fi
echo
cat "$folder/table.txt"
exit $failed
