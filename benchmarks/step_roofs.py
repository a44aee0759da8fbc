"""What a whole distillation step cannot avoid: its operations, and the floors of its parts on a GPU.

python benchmarks/step_roofs.py      # prints the floors of NOTES.md, for an H200; needs no GPU

A kernel takes as long as the matrix unit or the memory, whichever is slower; kernels run one after another, and nothing
is computed twice. Not counted: casts, the residual stream in fp32, copies of views.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import roofs

RELATIONS = "qk", "vv"
# Kernels of a pre-norm block: FLOP in N C^2, FLOP in N^2 C, numbers read and written in N C. Attention keeps no map in
# memory; additions are fused with the norm behind them, GELU with nothing.
FORWARD = {
    "norm1": (0, 0, 2),
    "qkv": (6, 0, 4),
    "attention": (0, 4, 4),
    "projection": (2, 0, 2),
    "addition, norm2": (0, 0, 4),
    "fc1": (8, 0, 5),
    "GELU": (0, 0, 8),
    "fc2": (8, 0, 5),
    "addition": (0, 0, 3),
}
BACKWARD = {
    "norm1": (0, 0, 4),
    "qkv": (12, 0, 8),
    "attention": (0, 8, 8),
    "projection": (4, 0, 4),
    "norm2": (0, 0, 4),
    "fc1": (16, 0, 10),
    "GELU": (0, 0, 12),
    "fc2": (16, 0, 10),
}
LAST_BLOCK = "norm1", "qkv"
PATCH_PIXELS = 3 * 16**2
# fp32 weight, gradient and both moments read, all but the gradient written; the bf16 copy of the weight and its
# gradient.
ADAMW_BYTES = 7 * 4 + 2 * (2 + 4)


@dataclass(frozen=True)
class Vit:
    """What of a vision transformer counts here: its width, and the 1-based block where it is tapped."""

    name: str
    width: int
    block: int

    def flop(self, num_tokens: int, *, backward: bool) -> int:
        """Of one image; the backward pass needs no gradient of the pixels."""
        kernels = BACKWARD if backward else FORWARD
        patches = 2 * (num_tokens - 1) * PATCH_PIXELS * self.width
        return patches + sum(self._flop(*k, num_tokens) for k in self._all(kernels))

    def floor_s(self, num_tokens: int, rates: roofs.Rates, *, backward: bool) -> float:
        """Of one image in bf16: each kernel takes as long as the matrix unit or the memory, whichever is slower."""
        patches = 2 * (num_tokens - 1) * PATCH_PIXELS * self.width / rates.flop_per_s
        num_bytes = 2 * num_tokens * self.width
        return patches + sum(
            max(self._flop(*k, num_tokens) / rates.flop_per_s, k[2] * num_bytes / rates.bytes_per_s)
            for k in self._all(BACKWARD if backward else FORWARD)
        )

    def num_parameters(self) -> int:
        """Of the products that the relation loss reaches."""
        return (12 * (self.block - 1) + 3) * self.width**2 + PATCH_PIXELS * self.width

    def _all(self, kernels: dict[str, tuple[int, int, int]]) -> Iterable[tuple[int, int, int]]:
        whole = [kernel for kernel in kernels.values() for _ in range(self.block - 1)]
        return [*whole, *(kernels[name] for name in LAST_BLOCK)]

    def _flop(self, of_width: int, of_tokens: int, numbers: int, num_tokens: int) -> int:
        return num_tokens * self.width * (of_width * self.width + of_tokens * num_tokens)


@dataclass(frozen=True)
class Pair:
    """Teacher and student of a recipe."""

    teacher: Vit
    student: Vit
    relation_heads: int

    def loss_shape(self, batch_size: int, num_tokens: int) -> roofs.Shape:
        """The relations of a batch, in bf16."""
        widths = {"head_dim_s": self.student.width, "head_dim_t": self.teacher.width}
        return roofs.Shape(
            batch_size=batch_size,
            num_heads=self.relation_heads,
            num_tokens=num_tokens,
            **{name: width // self.relation_heads for name, width in widths.items()},
            itemsize=2,
        )

    def flop(self, batch_size: int, num_tokens: int = 197) -> int:
        """Of a step; nothing is computed twice."""
        passes = [
            self.teacher.flop(num_tokens, backward=False),
            self.student.flop(num_tokens, backward=False),
            self.student.flop(num_tokens, backward=True),
        ]
        loss = roofs.total(RELATIONS, self.loss_shape(batch_size, num_tokens), backward=True)
        return batch_size * sum(passes) + loss.flop

    def floors_ms(self, batch_size: int, rates: roofs.Rates, num_tokens: int = 197) -> dict[str, float]:
        """Of a step's parts, which run one after another."""
        return {
            "teacher": 1e3 * batch_size * self.teacher.floor_s(num_tokens, rates, backward=False),
            "student forward": 1e3 * batch_size * self.student.floor_s(num_tokens, rates, backward=False),
            "student backward": 1e3 * batch_size * self.student.floor_s(num_tokens, rates, backward=True),
            "loss": roofs.floor_ms(RELATIONS, self.loss_shape(batch_size, num_tokens), rates, backward=True),
            "AdamW": 1e3 * ADAMW_BYTES * self.student.num_parameters() / rates.bytes_per_s,
        }


# The recipes tinymim_base, tinymim_small and tinymim_tiny; and the last from the teacher of the one before.
PAIRS = {
    "L-B": Pair(Vit("vit_large_patch16_224", 1024, 18), Vit("vit_base_patch16_224", 768, 12), 16),
    "B-S": Pair(Vit("vit_base_patch16_224", 768, 12), Vit("vit_small_patch16_224", 384, 12), 12),
    "S-T": Pair(Vit("vit_small_patch16_224", 384, 12), Vit("vit_tiny_patch16_224", 192, 12), 12),
    "B-T": Pair(Vit("vit_base_patch16_224", 768, 12), Vit("vit_tiny_patch16_224", 192, 12), 12),
}


def main(batch_size: int = 256) -> None:
    """Of an H200 under load: the steps of the recipes, in bf16."""
    rates = roofs.H200_UNDER_LOAD
    tflop_per_s, gb_per_s = rates.flop_per_s / 1e12, rates.bytes_per_s / 1e9
    print(f"batch {batch_size}: floors in ms on {tflop_per_s:.0f} TFLOP/s and {gb_per_s:.0f} GB/s")
    for name, pair in PAIRS.items():
        floors = pair.floors_ms(batch_size, rates)
        whole = sum(floors.values())
        parts = ", ".join(f"{part} {ms:.1f}" for part, ms in floors.items())
        flop = pair.flop(batch_size)
        print(
            f"{name}: {flop / batch_size / 1e9:.1f} GFLOP an image, {parts}; {whole:.1f} together, "
            f"{1e3 * batch_size / whole:.0f} images/s, matrix unit {flop / rates.flop_per_s / whole * 1e5:.0f} % busy"
        )


if __name__ == "__main__":
    main()
