#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4 from its source package, install it, and check it against a dense convolution.
#
#   docker/install_minkowski.sh [cpu|cuda|auto]
#
# It needs g++ and a Python that has torch and pip; no root, and no BLAS library. For CUDA it needs nvcc, which it fetches
# with pip where torch has CUDA 13 or newer from there. The wheel is kept: a second run installs it in seconds.
# Environment variables:
#
#   PYTHON                the interpreter to install for (default: python3)
#   MINKOWSKI_DEVICE      cpu, cuda or auto, the default: cuda where torch sees a GPU and nvcc can be had, else cpu
#   CXX                   the C++ compiler (default: g++)
#   CUDA_HOME             a CUDA toolkit to compile with (default: the one of pip, else /usr/local/cuda)
#   TORCH_CUDA_ARCH_LIST  the GPUs to compile for (default: those present, else 9.0)
#   MAX_JOBS              files to compile at a time (default: one a core, fewer where memory is short)
#   FCMAE_CACHE           where the wheel is kept (default: ~/.cache/fcmae, or fcmae in XDG_CACHE_HOME)
set -euo pipefail

fail() {
    echo "install_minkowski.sh: $*" >&2
    exit 2
}

# edit FILE EXPRESSION: a sed edit that must change something, so that another source cannot pass unmended.
edit() {
    sed -E -i.orig "$2" "$1"
    if cmp -s "$1" "$1.orig"; then fail "the edit '$2' matches nothing in $1: this script is for MinkowskiEngine 0.5.4"; fi
}

case "${1:-}" in
-h | --help)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
    exit 0
    ;;
esac
device="${1:-${MINKOWSKI_DEVICE:-auto}}"
python="${PYTHON:-python3}"
case "$device" in
cpu | cuda | auto) ;;
*) fail "the device is '$device': cpu, cuda or auto" ;;
esac
[ "$(uname -s)" = Linux ] || fail "MinkowskiEngine builds on Linux only; the packed backend needs no build"
python="$("$python" -c 'import sys; print(sys.executable)' 2>/dev/null)" ||
    fail "${PYTHON:-python3} does not run: name your Python in PYTHON"

# What the wheel depends on. cuda_wheel: the folder of the CUDA that pip installed with torch.
{
    read -r torch_version
    read -r torch_cuda
    read -r cuda_wheel
    read -r gpus
    read -r tag
} < <("$python" - <<'PY'
import sys
from importlib.util import find_spec


def fail(sentence):
    sys.exit("install_minkowski.sh: " + sentence)


if not (3, 10) <= sys.version_info < (3, 14):
    fail(f"Python {sys.version.split()[0]} is not supported: name one from 3.10 to 3.13 in PYTHON")
if find_spec("pip") is None:
    fail(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip', or name another in PYTHON")
try:
    import torch
except ImportError as error:
    fail(f"{sys.executable} cannot import torch ({error}): install it there, or name another in PYTHON")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    fail(f"torch {torch.__version__} is too old: install 2.9 or newer")

from pathlib import Path

cuda = torch.version.cuda or "none"
wheel = Path(torch.__file__).parent.parent / "nvidia" / f"cu{cuda.split('.')[0]}"
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(torch.__version__)
print(cuda)
print(wheel if wheel.is_dir() else "none")
print(";".join(sorted({"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)})) or "none")
print(f"cp{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}")
PY
) || exit 2

nvcc="${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"
if [ "$device" = auto ]; then
    device=cpu
    if [ "$gpus" != none ] && { [ "$cuda_wheel" != none ] || [ -x "$nvcc" ]; }; then device=cuda; fi
fi
target=cpu
if [ "$device" = cuda ]; then
    [ "$torch_cuda" != none ] || fail "torch $torch_version is built without CUDA: install a CUDA build of it, or ask for cpu"
    export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-${gpus/none/9.0}}"
    target="cuda$torch_cuda-sm${TORCH_CUDA_ARCH_LIST//[ ;]/-}"
fi
script="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cache="${FCMAE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fcmae}/minkowski"
cache="$(realpath -m "$cache")/torch$torch_version-$tag-$target-$(uname -m)-$(sha256sum "$script" | cut -c 1-12)"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
pip=("$python" -m pip --disable-pip-version-check)

# In the sources: what nvcc needs.
cuda() {
    if [ -z "${CUDA_HOME:-}" ] && [ "$cuda_wheel" != none ]; then
        # The nvcc of torch's own CUDA release, and the names that the linker asks for.
        "${pip[@]}" install -q --target "$work/toolkit" "cuda-toolkit[nvcc,cccl]==$torch_cuda.*"
        export CUDA_HOME="$work/toolkit/nvidia/${cuda_wheel##*/}"
        for library in libcudart libcusparse; do ln -s "$cuda_wheel/lib/$library.so".* "$CUDA_HOME/lib/$library.so"; done
    else
        export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
    fi
    # Thrust's headers, which g++ does not find where CUDA 13 keeps them; and cuBLAS's, where the toolkit is nvcc alone.
    # (The option is for any folder of headers.)
    options+=("--blas_include_dirs=$CUDA_HOME/include/cccl,$cuda_wheel/include")

    # Nothing of cuRAND is used, and its headers are in few installations.
    edit src/gpu.cuh '/^#include <curand.h>/d'
    # A marker for a profiler, from a copy of nvtx3 that collides with the toolkit's own.
    edit src/3rdparty/concurrent_unordered_map.cuh '/cudf.detail.nvtx.ranges.hpp|CUDF_FUNC_RANGE/d'
    # CUDA 13 changed the arguments of this hint. It was given for managed memory only, which is not used here.
    edit src/3rdparty/concurrent_unordered_map.cuh 's/cudaMemPrefetchAsync\(.*, stream\)/cudaSuccess/'
    # In the constructor of a shared_ptr from a unique_ptr, the standard library calls a function by a name that CUDA's own
    # std has too, and thrust's pair is one of its types: ambiguous, so the shared_ptr is made at once.
    edit src/3rdparty/concurrent_unordered_map.cuh 's/std::unique_ptr<Self, std::function<void\(Self\*\)>>\{/std::shared_ptr<Self>{/'
    # CUDA 13 has no thrust::unary_function. It named argument and result types, which nothing asks for.
    edit src/coordinate_map_functors.cuh \
        '/^ *: public thrust::unary_function<uint32_t,$/d; s/^ *thrust::pair<uint32_t, uint32_t>> \{$/{/'
    # Thrust's and torch's headers no longer include each other as they did.
    edit setup.py 's/^( *NVCC_FLAGS \+= \["-O3")\]/\1, "-include", "missing.cuh"]/'
    {
        echo '#include <ATen/core/Tensor.h>'
        printf '#include <thrust/%s.h>\n' count device_vector execution_policy fill for_each host_vector \
            iterator/zip_iterator reduce remove scan sequence sort transform tuple unique
    } >src/missing.cuh
}

build() {
    export CXX="${CXX:-g++}"
    command -v "$CXX" >/dev/null ||
        fail "the compiler $CXX is not found: install it (on Debian and Ubuntu: apt install g++), or name yours in CXX"
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        fail "$python has no Python.h: install its headers (on Debian and Ubuntu: apt install python3-dev)"
    if [ "$device" = cuda ] && [ ! -x "$nvcc" ] && { [ "$cuda_wheel" = none ] || [ -n "${CUDA_HOME:-}" ]; }; then
        fail "$nvcc is not there: install CUDA $torch_cuda's toolkit and name its folder in CUDA_HOME, or ask for cpu"
    fi

    # pip asks a source package for its metadata before it hands it over, which would run its setup.py: that uninstalls
    # MinkowskiEngine and searches for a BLAS library with a module that numpy has dropped. This answers in its place.
    mkdir -p answer/setuptools
    touch answer/setuptools/__init__.py
    cat >answer/setuptools/build_meta.py <<'PY'
import pathlib
import sys

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "MinkowskiEngine-0.5.4.dist-info")
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: MinkowskiEngine\nVersion: 0.5.4\n")
    return info.name
PY
    echo 'MinkowskiEngine==0.5.4 --hash=sha256:b1879c00d0b0b1d30ba622cce239886a7e3c78ee9da1064cdfe2f64c2ab15f94' >source.txt
    PYTHONPATH="$work/answer" "${pip[@]}" download -q --no-deps --no-binary :all: --no-build-isolation --use-pep517 \
        --require-hashes -r source.txt
    # The build's own tools, beside the environment rather than in it.
    "${pip[@]}" install -q --target tools setuptools==84.2.1 ninja==1.13.2
    tar xf MinkowskiEngine-0.5.4.tar.gz
    cd MinkowskiEngine-0.5.4

    # Python 3.10 took Sequence out of collections.
    for module in MinkowskiCommon MinkowskiCoordinateManager MinkowskiKernelGenerator MinkowskiTensorField utils/quantization; do
        edit "MinkowskiEngine/$module.py" \
            's/^from collections import Sequence(, (namedtuple))?$/from collections.abc import Sequence\nfrom collections import namedtuple/'
    done
    # Torch warns of an autograd function that is instantiated rather than applied as a class, and will refuse it.
    for module in Broadcast Convolution Interpolation Normalization Pooling Pruning SparseTensor TensorField Union; do
        edit "MinkowskiEngine/Minkowski$module.py" 's/(Minkowski[A-Za-z]+Function)\(\)/\1/'
    done
    # Which device it was built for was chosen, so importing it need not warn of it.
    edit MinkowskiEngine/__init__.py 's/^if not is_cuda_available\(\):/if False:/'
    # On more than 16 cores the import warns and sets OMP_NUM_THREADS for the process and its children.
    edit MinkowskiEngine/__init__.py 's/^if os.cpu_count\(\) > 16 and/if False and/'
    # What is installed is pip's business: setup.py would uninstall from whichever pip comes first on PATH.
    edit setup.py '/^run_command\("pip"/d'
    # Python's own flags ask for debugging symbols, which are most of the file.
    edit setup.py 's/^( *CC_FLAGS \+= \["-O3")\]/\1, "-g0"]/'
    # It calls four BLAS functions. Torch has a BLAS with its own threads already, so they are defined on that.
    edit setup.py '/^ *libraries.append\(BLAS\)/s/libraries.*/pass/'
    edit setup.py 's/^( *)"math_functions_cpu.cpp",/\1"math_functions_cpu.cpp", "cblas.cpp",/'
    cat >src/cblas.h <<'CPP'
#pragma once
enum CBLAS_ORDER { CblasRowMajor = 101, CblasColMajor = 102 };
enum CBLAS_TRANSPOSE { CblasNoTrans = 111, CblasTrans = 112 };
#define FUNCTIONS(T, p)                                                                                            \
  void cblas_##p##gemm(CBLAS_ORDER, CBLAS_TRANSPOSE, CBLAS_TRANSPOSE, int m, int n, int k, T alpha, const T *a,    \
                       int lda, const T *b, int ldb, T beta, T *c, int ldc);                                       \
  void cblas_##p##axpy(int n, T alpha, const T *x, int incx, T *y, int incy);
FUNCTIONS(float, s)
FUNCTIONS(double, d)
#undef FUNCTIONS
CPP
    cat >src/cblas.cpp <<'CPP'
#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
extern "C" {
#include "cblas.h"
}

template <typename T>
static at::Tensor matrix(const T *data, int rows, int cols, int ld, bool column_major) {
  return at::from_blob(const_cast<T *>(data), {rows, cols}, {column_major ? 1 : ld, column_major ? ld : 1},
                       c10::CppTypeToScalarType<T>::value);
}

// at::cpu:: calls the kernel itself, past autograd and autocast.
#define FUNCTIONS(T, p)                                                                                            \
  void cblas_##p##gemm(CBLAS_ORDER order, CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, int m, int n, int k, T alpha,    \
                       const T *a, int lda, const T *b, int ldb, T beta, T *c, int ldc) {                          \
    const bool columns = order == CblasColMajor;                                                                   \
    at::Tensor out = matrix(c, m, n, ldc, columns);                                                                \
    at::cpu::addmm_(out, matrix(a, m, k, lda, columns == (ta == CblasNoTrans)),                                    \
                    matrix(b, k, n, ldb, columns == (tb == CblasNoTrans)), beta, alpha);                           \
  }                                                                                                                \
  void cblas_##p##axpy(int n, T alpha, const T *x, int incx, T *y, int incy) {                                     \
    for (int i = 0; i < n; i++) y[i * incy] += alpha * x[i * incx];                                                \
  }
FUNCTIONS(float, s)
FUNCTIONS(double, d)
CPP

    options=(--cpu_only)
    per_job=2 # GiB of memory that one compiler may take
    if [ "$device" = cuda ]; then
        options=(--force_cuda)
        per_job=5
        cuda
    fi
    memory="$(awk '/^MemAvailable/ { print int($2 / 1024 / 1024 / '"$per_job"') }' /proc/meminfo)"
    jobs="$(nproc)"
    if [ "$memory" -lt "$jobs" ]; then jobs=$((memory > 0 ? memory : 1)); fi
    export MAX_JOBS="${MAX_JOBS:-$jobs}"
    echo "building MinkowskiEngine 0.5.4 for $target, torch $torch_version: minutes ($MAX_JOBS files at a time)"
    PATH="$work/tools/bin:$PATH" PYTHONPATH="$work/tools" \
        "$python" setup.py -q bdist_wheel "${options[@]}" --blas=blas -d "$work/wheel" >"$work/log" 2>&1 || {
        log="${TMPDIR:-/tmp}/minkowski-$$.log"
        cp "$work/log" "$log"
        grep -m 10 -A 3 -iE '(error:|fatal|killed)' "$log" >&2 || tail -n 20 "$log" >&2
        fail "the build failed: the first errors are above, everything is in $log"
    }
    cd "$work"
    # Renamed into place: a copy that was cut off is not a wheel.
    wheel="$(basename wheel/*.whl)"
    mkdir -p "$cache"
    cp "wheel/$wheel" "$cache/$wheel.$$"
    mv "$cache/$wheel.$$" "$cache/$wheel"
}

compgen -G "$cache/*.whl" >/dev/null || build
echo "installing $(echo "$cache"/*.whl)"
"${pip[@]}" install -q --no-deps --force-reinstall "$cache"/*.whl

# Kernel offsets go over the first axis fastest, which only a kernel that is not symmetric shows.
"$python" - "$device" <<'PY'
import sys
import warnings

import torch
import torch.nn.functional as F

warnings.simplefilter("error")
import MinkowskiEngine as ME

for device in ["cpu", "cuda"] if sys.argv[1] == "cuda" and torch.cuda.is_available() else ["cpu"]:
    torch.manual_seed(0)
    sites = torch.nonzero(torch.rand(2, 7, 5) < 0.6).contiguous()  # of a batch of two 7x5 images; (N, 3): image, row, column
    image, row, column = sites.T
    dense = torch.zeros(2, 4, 7, 5)
    dense[image, :, row, column] = torch.randn(len(sites), 4)
    dense.requires_grad_()
    convolution = ME.MinkowskiConvolution(4, 6, kernel_size=3, dimension=2).to(device)
    weight = convolution.kernel.detach().cpu().reshape(3, 3, 4, 6).permute(3, 2, 1, 0).requires_grad_()
    features = dense.detach()[image, :, row, column].to(device).requires_grad_()
    out = convolution(ME.SparseTensor(features, coordinates=sites.int().to(device)))
    image, row, column = out.C.long().cpu().T
    expected = F.conv2d(dense, weight, padding=1)[image, :, row, column]
    gradient = torch.randn_like(expected)
    out.F.backward(gradient.to(device))
    expected.backward(gradient)
    image, row, column = sites.T
    pairs = {
        "output": (out.F, expected),
        "input gradient": (features.grad, dense.grad[image, :, row, column]),
        "weight gradient": (convolution.kernel.grad.reshape(3, 3, 4, 6).permute(3, 2, 1, 0), weight.grad),
    }
    for name, (got, wanted) in pairs.items():
        error = (got.cpu() - wanted).abs().max().item()
        print(f"{device}: {name} against torch's conv2d: largest error {error:.1e}")
        if not error < 1e-4:
            sys.exit("install_minkowski.sh: MinkowskiEngine computes something else than torch on this machine")
PY
