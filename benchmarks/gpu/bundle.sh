#!/usr/bin/env bash
# Makes .gpu/site.tar.xz in the project's root: stock vLLM and what it imports, for a machine with Python 3.12,
# torch 2.11 (CUDA 13), Triton 3.6 and an sm_90 GPU, that cannot download anything. About 50 MB; takes some minutes.
# Whatever a dense model in bfloat16 or float32 does not need is left out: see the end.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
root=$(readlink -f "$here/../..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir -p "$site" "$root/.gpu"

PYTHON=${PYTHON:-python3}
PLATFORMS=()
for glibc in 2_35 2_34 2_31 2_28 2_27 2_24 2_17; do PLATFORMS+=(--platform "manylinux_${glibc}_x86_64"); done
PLATFORMS+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64 --platform any)
PACKAGES=(
    vllm==0.32.0 transformers==5.19.0 'pyzmq>=25' cbor2 openai-harmony 'openai>=2.25' httpx2 sniffio msgspec pybase64
    cachetools xgrammar==0.2.8 apache-tvm-ffi==0.1.11 'fastapi>=0.133,<0.137' 'starlette>=1.0.1' opentelemetry-api
    partial-json-parser 'llguidance>=1.7,<1.8'
    # What these import: none of it comes with torch or its usual companions.
    pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection httpcore2 truststore jiter distro
)
for package in "${PACKAGES[@]}"; do
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --abi cp312 --abi abi3 --abi none "${PLATFORMS[@]}" -d "$work/wheels" "$package"
done
for wheel in "$work"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$site"; done
rm -r "$work/wheels"

cd "$site"
"$PYTHON" "$here/prune_so.py" vllm/_C_stable_libtorch.abi3.so "$work/_C.so"
mv "$work/_C.so" vllm/_C_stable_libtorch.abi3.so
# Kept: the C operators, FlashAttention 3, cumem, spinloop. Not needed:
rm -f vllm/_moe_C* vllm/_deepselect_C* vllm/_flash*_C* vllm/_qutlass_C* vllm/fs_io_C* \
    vllm/vllm_flash_attn/_vllm_fa2_C*
rm -rf vllm/vllm-rs vllm/third_party/deep_gemm vllm/third_party/fmha_sm100/cutlass vllm/benchmarks ./*.data
# The plugin is found by its entry point; its sources come with the working tree.
mkdir paged_kv-0.1.0.dist-info
printf 'Metadata-Version: 2.1\nName: paged-kv\nVersion: 0.1.0\n' > paged_kv-0.1.0.dist-info/METADATA
printf '[vllm.general_plugins]\n' > paged_kv-0.1.0.dist-info/entry_points.txt
grep '^paged_kv = "paged_kv.vllm' "$root/pyproject.toml" | tr -d '"' >> paged_kv-0.1.0.dist-info/entry_points.txt
tar -C "$work" -c site | xz -T0 -6 > "$root/.gpu/site.tar.xz"
ls -l "$root/.gpu/site.tar.xz"
