#!/usr/bin/env bash
# Runs all checks that need a GPU, without supervision, the most important ones first.
#
#   tools/gpu_check.sh wheels DIR [PYTHON_VERSION]   on a machine with a network: download all packages except torch
#   tools/gpu_check.sh run DIR OUT                   on the GPU machine, which needs only Python and torch: three parts in
#                                                    five minutes, then tests and compilation in ten more minutes; each
#                                                    part has its own time limit and log
set -uo pipefail
cd "$(dirname "$0")/.."

wheels() {
  local into=$1 version=${2:-3.12}
  mkdir -p "$into"
  grep -vE '^(torch|nvidia-|triton|ruff|pyright|nodeenv)' constraints.txt >"$into/constraints.txt"
  python3 - "$into" <<'PY' >"$into/requirements.txt"
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for one in project["dependencies"] + ["setuptools>=80", "pytest>=9.0", "pytest-xdist>=3.8", "hypothesis>=6.150", "beartype>=0.22", "peft>=0.19"]:
    if not one.startswith("torch>"):
        print(one)
PY
  python3 -m pip download -q --only-binary=:all: --no-deps --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any -d "$into" -r <(sed 's/#.*//' "$into/constraints.txt")
}

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit $? after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
  tail -n 40 "$out/$name.log"
}

run() {
  local from=$1
  out=$2
  mkdir -p "$out"
  python3 -m venv --system-site-packages "$out/venv"
  local python=$out/venv/bin/python
  "$python" -m pip install -q --no-index --no-deps --no-build-isolation "$from"/*.whl
  export PYTHONPATH=$PWD/src
  nvidia-smi >"$out/card.txt"
  part selftest 120 "$python" -m unbraid selftest
  part graphs 120 "$python" -m tools.speed gpu --way eager --way graphs
  part jobs 60 "$python" -m tools.speed.many --only icons --at-once 8 --device cuda
  part tests 200 "$python" -m pytest -n 4 tests/test_graphs.py tests/test_run.py tests/test_lora.py tests/test_unziplora.py tests/test_memory.py
  part compiled 400 "$python" -m tools.speed gpu
  rm -rf "$out/venv"
}

case "${1:-}" in
  wheels | run) "$@" ;;
  *) sed -n '2,8p' "$0" && exit 2 ;;
esac
