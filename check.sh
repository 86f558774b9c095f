#!/usr/bin/env bash
# Lints, checks types and runs the tests; further arguments go to pytest:  bash check.sh [-k NAME …]
set -eo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh"
cd "$root"
find_python check
# Test processes share the machine; more threads than cores slow each other down many times over.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCHINDUCTOR_COMPILE_THREADS=1 # what little is compiled is not worth a pool of processes that import torch

echo '+ ruff'
"$python" -m ruff check .
"$python" -m ruff format --check .
echo '+ mypy'
"$python" -m mypy
echo '+ pytest'
# Two processes, as a machine of CI has two cores.
"$python" -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"
