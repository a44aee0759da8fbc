"""Distil a student ViT from a frozen teacher by token relations.

deepspeed tinymim_fast/train.py --config tinymim_fast/recipes/NAME.yaml --data-path DIR --teacher-checkpoint FILE \
    --output-dir DIR [--FIELD VALUE ...]
"""

from __future__ import annotations

import os
import sys

# Before torch starts OpenMP: threads that spin while they wait take the cores from those that decode. A short spin was
# fastest on two quiet cores (benchmarks/NOTES.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Started as a file, this folder is first on the path, and its modules are not top-level ones.
if __package__ in (None, ""):
    sys.path.pop(0)

from collections.abc import Sequence

from tinymim_fast.errors import end_process
from tinymim_fast.tasks.distill import DistillConfig, build_task
from tinymim_fast.training import program


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (None: the command line), train, and return the exit code."""
    return program.main(DistillConfig, build_task, argv, "train.py")


if __name__ == "__main__":
    end_process(main())
