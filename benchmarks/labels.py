"""What a provider is called in tables and pictures, in which colour, and which are ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Label:
    """Of one provider: its name in the README, its colour and its marker in pictures."""

    name: str
    color: str  # Okabe and Ito's palette, told apart with any colour vision
    marker: str = "o"


# By the provider's name in result files, in the order of tables and pictures.
LABELS = {
    "official": Label("official formula", "#222222", "s"),
    "eager": Label("log-softmax, eager", "#D55E00", "D"),
    "compile": Label("`torch.compile`", "#CC79A7", "^"),
    "compile_padded": Label("`torch.compile`, shape padding", "#7F7F7F", "v"),
    "chunked": Label("**`chunked`**", "#0072B2"),
    "triton": Label("**`triton`**", "#009E73"),
    "official_loop": Label("official loop", "#222222", "s"),
    "plain": Label("plain PyTorch loop, our teacher and loss", "#D55E00", "D"),
    "ours": Label("**`train.py`**", "#0072B2"),
    "together": Label("**`train.py`, several students of one teacher pass**", "#0072B2"),
    "apart": Label("`train.py`, one student after another", "#7F7F7F"),
    "dali_mixed": Label("**DALI**, decoding on the GPU", "#009E73"),
    "dali_cpu": Label("**DALI**", "#0072B2"),
    "fallback": Label("`--loader torchvision`", "#7F7F7F"),
    "torchvision": Label("torchvision, PIL", "#222222"),
    "torchvision_v2": Label("torchvision, `v2` on tensors", "#D55E00"),
}
# The first that has a number is what ratios are of.
OURS = ("triton", "chunked", "ours", "dali_mixed", "dali_cpu", "fallback")


def label(provider: str) -> Label:
    """Of any provider; one that is not in LABELS is called as it is in result files, in grey."""
    return LABELS.get(provider, Label(provider, "#7F7F7F"))


def in_order(providers: Iterable[str]) -> list[str]:
    """Each once: those of LABELS in its order, then others by name."""
    found = set(providers)
    return [*(name for name in LABELS if name in found), *sorted(found - LABELS.keys())]


def our_row(rows: Iterable[Mapping[str, Any]], column: str = "step_ms") -> Mapping[str, Any] | None:
    """The row that ratios are of: of ours, the first that has a number in the column."""
    by_provider = {row["provider"]: row for row in rows if row[column]}
    return next((by_provider[name] for name in OURS if name in by_provider), None)
