"""The host's time of one call of relation_loss on backend "triton", forward and backward, without a GPU.

python benchmarks/host_time.py

Kernels are compiled for sm_90 and their launches do nothing: Triton's driver is replaced by one that names a device
and launches on none. What is left is Python, dispatch and the host's part of PyTorch's operators on tensors so small
that their work is nothing (on the CPU, where an operator costs about what its launch costs on a GPU). The C launcher
and the driver's call, a few microseconds each, are not counted. Medians; the quartiles tell how quiet the machine was.
"""

import argparse
import os
import statistics
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget

from tinymim_fast.kernels import relation_loss, triton_backend

SHAPE = (2, 17, 3 * 3 * 16)  # (B, N, 3 C)


class _NoDevice:
    """A Triton driver for a GPU that is not there: compiles for sm_90, loads and launches nothing."""

    class launcher_cls:
        def __init__(self, source, metadata):
            pass

        def __call__(self, *arguments):
            pass

    class utils:
        @staticmethod
        def load_binary(*arguments):
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "warpSize": 32}

        @staticmethod
        def unload_module(*arguments):
            pass

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def step_us(step, repeats: int) -> list[float]:
    """Quartiles of the time of one call, in microseconds."""
    for _ in range(20):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        step()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.quantiles(times, n=4)


def main() -> None:
    """Prints three medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET: got 1, want it unset: interpreted kernels have no launch to count")
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_NoDevice())
    triton_backend.INTERPRETED = True  # takes tensors on the CPU

    qkv_s = torch.randn(SHAPE, dtype=torch.bfloat16, requires_grad=True)
    qkv_t = torch.randn(SHAPE, dtype=torch.bfloat16)

    def forward():
        return relation_loss(qkv_s, qkv_t, relation_heads=3, backend="triton")["loss"]

    def forward_backward():
        qkv_s.grad = None
        forward().backward()

    def forward_without_gradient():
        with torch.no_grad():
            forward()

    for step in (forward_without_gradient, forward, forward_backward):
        low, median, high = step_us(step, args.repeats)
        print(f"{step.__name__:26s} {median:7.1f} us  ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
