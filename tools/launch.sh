# Sourced by the other scripts: answers --help, finds or makes the Python environment, starts main.py.
# Paths that a user gives are relative to the folder the user is in; the project's own are under $root.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in
    -h | --help) sed -n '2,/^set/{/^set/d;/^#SBATCH/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[1]}"; exit ;; # the comment on top of the script
esac

# find_python [GROUP…]: sets python to an interpreter that has the packages of pyproject.toml (and of the optional
# groups): $PYTHON, else the active environment's, else .venv's, which is made from requirements.txt if need be.
find_python() {
    local candidate base=''
    if [ -n "$PYTHON" ] && ! "$PYTHON" -c '' 2> /dev/null; then
        echo "error: PYTHON=$PYTHON cannot be run" >&2
        exit 2
    fi
    for candidate in "$PYTHON" python python3 "$root/.venv/bin/python"; do
        if [ -n "$candidate" ] && command -v "$candidate" > /dev/null \
            && "$candidate" "$root/tools/check_env.py" "$@" > /dev/null 2>&1; then
            python=$candidate
            [ "${PYTHON:-$python}" = "$python" ] || echo "PYTHON=$PYTHON lacks packages, so $python is used" >&2
            return
        fi
    done
    for candidate in "$PYTHON" python3 python python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
            base=$candidate
            break
        fi
    done
    if [ -z "$base" ]; then
        echo 'error: no Python 3.10 or later found; install one, or set PYTHON to its path' >&2
        exit 1
    fi
    if [ -n "$DRY_RUN" ]; then
        python=$base
        return
    fi
    echo "$base lacks packages: $("$base" "$root/tools/check_env.py" "$@" 2>&1 | head -n 3 | tr '\n' ';')"
    echo "Installing requirements.txt into $root/.venv, once; about 5 GB for the CUDA build of torch."
    if ! { [ -x "$root/.venv/bin/python" ] && "$root/.venv/bin/python" -m pip --version > /dev/null 2>&1; }; then
        "$base" -m venv --clear "$root/.venv" || { echo "error: $base -m venv failed; is its venv module installed?" >&2; exit 1; }
    fi
    python=$root/.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" || {
        echo 'error: pip could not install requirements.txt; start again once its error above is mended' >&2
        exit 1
    }
    "$python" "$root/tools/check_env.py" "$@" || { echo 'error: .venv lacks the above although pip installed it' >&2; exit 1; }
}

# data_flags RECIPE: sets data_set and data_path (unless DATA is set) for a recipe's name.
data_flags() {
    case $1 in
        digits) data_set=DIGITS data_path='' ;;
        cifar100) data_set=CIFAR data_path=data/cifar ;;
        cifar10 | fast) data_set=CIFAR10 data_path=data/cifar ;;
        imagenet | deit | evit) data_set=IMNET data_path=data/imagenet ;;
        clipart | infograph | painting | quickdraw | real | sketch) data_set=$1 data_path=data/domainnet ;;
        folder) data_set=FOLDER data_path=data/folder ;;
        *)
            echo "error: unknown recipe '$1'; known are digits, cifar100, cifar10, fast, imagenet, deit, evit, folder and DomainNet's" \
                'clipart, infograph, painting, quickdraw, real, sketch' >&2
            exit 2
            ;;
    esac
    data_path=${DATA:-$data_path}
}

# launch NAME MODEL TOTAL_BATCH FLAG…: trains with TOTAL_BATCH images a step, shared out over all processes.
launch() {
    local name=$1 model=$2 total=$3
    shift 3
    local nnodes=${NNODES:-1} accum=${ACCUM:-1} nproc=${NPROC:-} restarts=${RESTARTS:-0} command gpus number line
    for number in "${nproc:-1}" "$nnodes" "$accum" "${MASTER_PORT:-1}"; do
        if ! [[ $number =~ ^[1-9][0-9]{0,4}$ && $number -le 65535 ]]; then
            echo "error: NPROC, NNODES, ACCUM and MASTER_PORT are whole numbers from 1 to 65535, not '$number'" >&2
            exit 2
        fi
    done
    if [ -z "$nproc" ]; then
        gpus=$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))' 2> /dev/null || echo 1)
        nproc=$gpus
        while [ "$nproc" -gt 1 ] && [ $((total % (nproc * nnodes * accum))) -ne 0 ]; do
            nproc=$((nproc - 1))
        done
        [ "$nproc" -eq "$gpus" ] || echo "Using $nproc of $gpus GPUs, so that they share a total batch of $total evenly."
    fi
    if ! [[ $restarts =~ ^(0|[1-9][0-9]{0,4})$ ]]; then
        echo "error: RESTARTS is a whole number below 100000, not '$restarts'" >&2
        exit 2
    fi
    local parts=$((nproc * nnodes * accum))
    if [ $((total % parts)) -ne 0 ]; then
        echo "error: a total batch of $total cannot be shared out: NPROC ($nproc) x NNODES ($nnodes) x ACCUM ($accum)" \
            'must divide it' >&2
        exit 2
    fi
    local torchrun=("$python" -m torch.distributed.run --nproc_per_node "$nproc" --max_restarts "$restarts")
    # By default a hang-up ends torchrun's group, although nohup had it ignored.
    [ -z "$(trap -p HUP)" ] || torchrun+=(--signals-to-handle SIGTERM,SIGINT,SIGQUIT)
    if [ "$LAUNCHER" = srun ]; then
        command=(srun --kill-on-bad-exit=1 --ntasks=$((nproc * nnodes)) --ntasks-per-node="$nproc" "$python") # a task for each process
    elif [ $((nproc * nnodes)) -eq 1 ] && [ "$restarts" -eq 0 ]; then
        command=("$python")
    elif [ "$nnodes" -eq 1 ]; then
        command=("${torchrun[@]}" --standalone) # a free port
    else
        if [ -z "$MASTER_ADDR" ]; then
            echo 'error: NNODES above 1 needs MASTER_ADDR, the name of one of them, the same on each' >&2
            exit 2
        fi
        command=("${torchrun[@]}" --nnodes "$nnodes" --rdzv_id "$name" --rdzv_backend c10d
            --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
    fi
    local flags=(--batch-size $((total / parts)) --accum-steps "$accum" --dist-eval
        --data-set "$data_set" --output_dir "${OUTPUT:-output/$name}" --auto-resume --checkpoint-every 10m)
    [ -z "$model" ] || flags=(--model "$model" "${flags[@]}")
    [ -z "$data_path" ] || flags+=(--data-path "$data_path")
    flags+=("$@") # the last of a flag counts
    command+=("$root/main.py" "${flags[@]}")
    line=$(printf ' %q' "${command[@]}")
    if [ -n "$DRY_RUN" ]; then
        echo "${line# }" # to be pasted
        return
    fi
    echo "+$line"
    if [ "$nproc" -gt 1 ] && [ -z "$OMP_NUM_THREADS" ]; then
        OMP_NUM_THREADS=$(PYTHONPATH=$root "$python" -c "import utils; print(max(utils.num_usable_cores() // $nproc, 1))")
        export OMP_NUM_THREADS
    fi
    exec "${command[@]}"
}
