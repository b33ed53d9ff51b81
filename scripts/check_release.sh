#!/usr/bin/env bash
# What a release must pass and CI does not do, as it takes minutes: sdist and wheel are built, the wheel is installed
# into an empty environment with the pinned dependencies, and the smallest study runs there.
#
#   bash scripts/check_release.sh [DIR]     keeps the files in DIR/dist; default: a temporary folder, which is deleted
#   PYTHON=python3.12 bash ...              with another Python than python3
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
unset PYTHONPATH
if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work="$(cd "$1" && pwd)"
else
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
fi

pip=(-m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")
"${PYTHON:-python3}" -m venv --clear "$work/tools"
"$work/tools/bin/python" "${pip[@]}" build
"$work/tools/bin/python" -m build --outdir "$work/dist" "$root"
wheel=("$work"/dist/neurondrift-*.whl)
[ ${#wheel[@]} -eq 1 ] || { echo "$work/dist holds several wheels" >&2; exit 2; }

"${PYTHON:-python3}" -m venv --clear "$work/venv"
export PATH="$work/venv/bin:$PATH"
cd "$work" # so that nothing is imported from the repository
python "${pip[@]}" torch==2.13.0
python "${pip[@]}" "${wheel[0]}"
python "${pip[@]}" --dry-run --find-links "$work/dist" "neurondrift[sweep,docs,dev]"
echo "neurondrift $(neurondrift --version), installed from $(basename "${wheel[0]}"); its extras resolve"

export HF_HUB_OFFLINE=1
neurondrift run --preset smoke --output-dir study
grep -m 1 -A 3 "^Answer:" study/results/drift_analysis_report.txt
