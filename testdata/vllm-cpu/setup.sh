#!/usr/bin/env bash
# Set up a real vLLM without a GPU and without weights, for `make test-vllm`.
#
#   setup.sh DIR     makes or completes DIR/venv (0.8 GB to fetch, 2.2 GB on disk) and DIR/model
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=${1:?usage: setup.sh DIR}
mkdir -p "$dir"
"$here/install.sh" "$(cd "$dir" && pwd)/venv"
"$here/make_tiny_model.py" "$dir/model"
