"""What chunked.py does on a CPU that has a C++ compiler: cpu_kernel.cpp, compiled at its first use.

The library is kept in $XDG_CACHE_HOME/tinymim_fast (~/.cache/tinymim_fast) under a name that depends on source,
compiler, flags, CPU and OpenMP runtime. It is loaded by ctypes, runs in PyTorch's number of threads and in its OpenMP
runtime, and is called from inside custom ops only, so that no torch.compile of a user ever sees it.

Without a compiler chunked.py's own PyTorch stays and nothing is said; a compiler that fails is named in one warning.
TINYMIM_FAST_CPU_KERNEL=0 in the environment turns all of this off.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tinymim_fast.kernels.reference import working_dtype

SWITCH = "TINYMIM_FAST_CPU_KERNEL"
SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # by their number in the library


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("b", "h", "n", "dtype"))]

    @classmethod
    def of(cls, z: Tensor | None) -> "_Tensor":
        """(B, H, N, D) with the last dimension contiguous; None for a tensor without data."""
        return cls() if z is None else cls(z.data_ptr(), *z.stride()[:3], DTYPES.index(z.dtype))


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("x_s", "y_s", "x_t", "y_t", "d_x", "d_y")),
        *((name, ctypes.c_void_p) for name in ("rows", "weights", "lengths")),
        *((name, ctypes.c_int64) for name in ("num_images", "num_heads", "num_tokens", "width_s", "width_t")),
        *((name, ctypes.c_double) for name in ("scale_s", "scale_t", "gradient_scale")),
        ("num_threads", ctypes.c_int64),
    ]


def takes(*tensors: Tensor) -> bool:
    """Whether the library is there, which this compiles where it is not yet, and knows these tensors' dtypes."""
    if any(z.device.type != "cpu" for z in tensors) or (library := _library()) is None:
        return False
    return all(z.dtype in DTYPES and (z.dtype != torch.float16 or library.has_float16()) for z in tensors)


def relation_kl(
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    *,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None = None,
    row_weights: Tensor | None = None,
    d_x: Tensor | None = None,
    d_y: Tensor | None = None,
    gradient_scale: float = 1.0,
) -> Tensor | None:
    """As chunked.relation_kl, of tensors that it `takes`.

    Memory: a thread holds one head's projections, their transposes and 32 rows of both maps. Deterministic,
        whatever the number of threads; heads are shared out among them.
    """
    return _call(_library(), x_s, y_s, x_t, y_t, scale_s, scale_t, lengths, row_weights, d_x, d_y, gradient_scale)


def _call(
    library: ctypes.CDLL,
    x_s: Tensor,
    y_s: Tensor,
    x_t: Tensor,
    y_t: Tensor,
    scale_s: float,
    scale_t: float,
    lengths: Tensor | None,
    row_weights: Tensor | None,
    d_x: Tensor | None,
    d_y: Tensor | None,
    gradient_scale: float = 1.0,
) -> Tensor | None:
    num_images, num_heads, num_tokens, width_s = x_s.shape
    dtype = working_dtype(x_s, x_t)
    rows = x_s.new_empty(num_images, num_heads, num_tokens, dtype=dtype) if row_weights is None else None
    row_weights = None if row_weights is None else row_weights.to(dtype).contiguous()
    lengths = None if lengths is None else lengths.long().contiguous()
    problem = _Problem(
        *map(_Tensor.of, (x_s, y_s, x_t, y_t, d_x, d_y)),
        *(None if z is None else z.data_ptr() for z in (rows, row_weights, lengths)),
        *(num_images, num_heads, num_tokens, width_s, x_t.shape[3]),
        *(scale_s, scale_t, gradient_scale, torch.get_num_threads()),
    )
    if getattr(library, f"relation_kl_{str(dtype).removeprefix('torch.')}")(ctypes.byref(problem)):
        raise MemoryError("the relation loss has no room for one head a thread")
    return rows


@cache
def _library() -> ctypes.CDLL | None:
    """The loaded functions, or None where they can't be had; what fails is said once."""
    compiler = _compiler()
    if compiler is None or sys.platform != "linux" or os.environ.get(SWITCH) == "0":
        return None
    try:
        return _found_or_built(compiler)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"backend 'chunked' runs without its compiled loops, slower: {shlex.join(compiler)}: "
            f"{output.strip()[-500:]}; CXX=... names another compiler, {SWITCH}=0 makes no attempt",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiler() -> list[str] | None:
    """The command: $CXX, or the first that is on the PATH."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    return None if found is None else [found]


def _found_or_built(compiler: list[str]) -> ctypes.CDLL:
    """From the cache, or compiled, checked and put there; processes that compile at once each rename a whole file."""
    runtime, version = _openmp_runtime(), _run([*compiler, "--version"])
    described = [SOURCE.read_text(), *compiler, version, *FLAGS, os.path.basename(runtime), _cpu()]
    name = f"chunked_{hashlib.sha256(chr(0).join(described).encode()).hexdigest()[:20]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cached = Path(home) / "tinymim_fast" / name
    if cached.exists():
        with contextlib.suppress(OSError, ValueError):  # a damaged one is made anew
            return _load(cached)
    with tempfile.TemporaryDirectory(prefix="tinymim_fast_") as scratch:
        compiled, linked = os.path.join(scratch, "chunked.o"), os.path.join(scratch, name)
        _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", compiled])
        # PyTorch's own runtime: a second one would have threads of its own, which spin beside the first one's.
        _run([*compiler, "-shared", compiled, runtime or "-fopenmp", "-o", linked])
        library = _load(Path(linked))
        temporary = cached.with_name(f"tmp_{secrets.token_hex(4)}_{name}")
        with contextlib.suppress(OSError):  # where it can't be written, every process compiles
            cached.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copy(linked, temporary)
            os.replace(temporary, cached)
    return library


def _openmp_runtime() -> str:
    """Path of the OpenMP library that is loaded in this process; empty where none is found."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ""
    found = re.search(r"\S*/lib(?:gomp|iomp5|omp)(?:-\w+)?\.so[.\d]*", maps)
    return found[0] if found else ""


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, stdin=subprocess.DEVNULL)
    return done.stdout


@torch.no_grad()
def _load(path: Path) -> ctypes.CDLL:
    """The library, once its results on one small map are right."""
    library = ctypes.CDLL(str(path))
    for dtype in (torch.float32, torch.float64):
        wave = torch.linspace(-3, 3, 17 * 5, dtype=torch.float64, device="cpu")
        x_s, x_t = ((k * wave).sin().to(dtype).view(1, 1, 17, 5) for k in (1, 2))
        d_x = torch.empty_like(x_s)
        rows = _call(library, x_s, x_t, x_t, x_s, 1.0, 0.5, None, None, d_x, None)
        with torch.autocast("cpu", enabled=False):
            x_s, x_t = x_s.double(), x_t.double()
            log_s, log_t = torch.log_softmax(x_s @ x_t.mT, dim=-1), torch.log_softmax(0.5 * (x_t @ x_s.mT), dim=-1)
            wanted = (log_t.exp() * (log_t - log_s)).sum(-1), (log_s.exp() - log_t.exp()) @ x_t
        if not all(torch.allclose(got.double(), z, rtol=1e-4, atol=1e-5) for got, z in zip((rows, d_x), wanted)):
            raise ValueError("the compiled library computes something else")
    return library
