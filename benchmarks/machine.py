"""What a benchmark ran on, as far as Python alone can tell: run_all.py works where torch is missing."""

import platform
import subprocess
from pathlib import Path


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def driver() -> str:
    """Version of the GPU driver; empty where there is none."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str:
    return _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty") or "no git"


def _first_line(*command: str) -> str:
    """Of what a program prints; empty where it is missing or fails."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return printed.strip().partition("\n")[0]
