#!/usr/bin/env bash
# The GPU campaign in stages, each of which writes its result before the next begins:
#
#   bench/gpu_suite.sh [--dry] STAGE|GROUP...        bench/gpu_suite.sh --list
#
# Runs the package from this folder and installs nothing; bench/gpu_stages.py has the stages.
#
#   GPU_OUT=out        where results and weights are put to be fetched
#   GPU_WORK=...       results, caches, trainings; a second call goes on with them (a folder in $TMPDIR)
#   GPU_MINUTES=9.5    for the whole call; a stage that no time is left for is not begun
#   GPU_RESUME=FILE    results.tar.gz of an earlier machine, to go on with
#   GPU_DATA="A B"     roots of recordings, for training and quality
#   GPU_PARCELS="A B"  recordings as parcels (bench/parcels.py) instead, as far as they have arrived
#   GPU_WHEELS=DIR     wheels of packages that the machine lacks: put on the path
#   FASTSCORE_COMMIT   of a copy without its repository: git describe --always --dirty --abbrev=40
#
# Exit code 1 where a stage failed, 2 for a wrong call.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
dry=''
for word in "$@"; do [ "$word" != --dry ] || dry=-dry; done
export GPU_WORK=${GPU_WORK:-${TMPDIR:-/tmp}/fastscore-gpu$dry}
mkdir -p "$GPU_WORK/site"
ln -sfn "$PWD/kernels" "$GPU_WORK/site/fastscore_kernels"
path=$PWD:$GPU_WORK/site
if [ -n "${GPU_WHEELS:-}" ]; then
    if [ ! -d "$GPU_WORK/wheels" ]; then
        # under another name until all of them are there
        rm -rf "$GPU_WORK/wheels.part"
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$GPU_WORK/wheels.part" \
            "$GPU_WHEELS"/*.whl || { echo "gpu_suite: wheels in $GPU_WHEELS cannot be unpacked" >&2; exit 2; }
        mv "$GPU_WORK/wheels.part" "$GPU_WORK/wheels"
    fi
    path=$path:$GPU_WORK/wheels
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$GPU_WORK/triton TORCHINDUCTOR_CACHE_DIR=$GPU_WORK/inductor
export FASTSCORE_CACHE=${FASTSCORE_CACHE:-$GPU_WORK/cache}
exec "$python" bench/gpu_runner.py "$@"
