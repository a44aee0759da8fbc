"""What a benchmark ran on, and tables of text, with Python alone: run_all.py works where torch is missing."""

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path


def cpu_name() -> str:
    """Of the first core, with family and model: a virtual machine's name often says no more than the vendor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    first = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in first:
        return platform.processor()
    numbers = ", ".join(f"{key.split()[-1]} {first[key]}" for key in ("cpu family", "model") if key in first)
    return first["model name"] + (f" ({numbers})" if numbers else "")


def driver() -> str:
    """Version of the GPU driver; empty where there is none."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str:
    """As git describes it, "-dirty" where files are changed; "no git" without a repository."""
    return _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty") or "no git"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Lines of text with columns two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def _first_line(*command: str) -> str:
    """Of what a program prints; empty where it is missing or fails."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return printed.strip().partition("\n")[0]
