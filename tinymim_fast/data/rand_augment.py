"""timm's RandAugment with draws from outside: operations, strengths and signs are the caller's, the pictures timm's.

timm's `AugmentOp` draws what it needs from Python's and NumPy's global generators while it works, so that its pictures
depend on what ran before. Here the draws are arrays, and its operations are called with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment

# Which number of a matrix is the argument, and whether it counts sides of the picture.
_MOVES = {"ShearX": (1, False), "ShearY": (3, False), "TranslateXRel": (2, True), "TranslateYRel": (5, True)}


class RandAugment:
    """timm's RandAugment (arXiv 1909.13719) as a function of uniforms.

    Args:
        config: timm's, `rand-m9-mstd0.5-inc1`: see `timm.data.auto_augment.rand_augment_transform`.
        mean: per channel, of 1: what a shifted picture leaves empty is filled with it.

    Attributes:
        names: of timm's operations, as `draw` numbers them.
        fill: that mean, of 255.
        num_layers: operations in a row.
        num_uniforms: what `draw` takes: of each layer which operation, whether at all, how strong, and which way.
    """

    def __init__(self, config: str, mean: Sequence[float]):
        self.fill = tuple(min(255, round(255 * m)) for m in mean)  # as timm.data.create_transform
        hparams = {"img_mean": self.fill, "interpolation": Image.BICUBIC}
        policy = auto_augment.rand_augment_transform(config, hparams)
        self.names = tuple(op.name for op in policy.ops)
        self.num_layers, self.num_uniforms = policy.num_layers, 4 * policy.num_layers
        self._ops, self._weights = policy.ops, policy.choice_weights
        self._argument_of = [[_with_sign(op.level_fn, negated) for negated in (False, True)] for op in policy.ops]

    def draw(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What these uniforms mean for n images, in L layers.

        Args:
            uniforms: (n, num_uniforms) in [0, 1).

        Returns:
            (n, L) int32, operations as positions in `names`, -1 for none in this layer; and (n, L) float64, what
            timm's operation is called with: degrees, a factor, a threshold; 0 for those that take nothing.
        """
        which, whether, how, way = np.moveaxis(uniforms.reshape(len(uniforms), self.num_layers, 4), 2, 0)  # (n, L)
        op = self._ops[0]  # probability and strength are those of all
        if op.magnitude_std == float("inf"):
            magnitudes = op.magnitude * how
        else:
            normal = torch.special.ndtri(torch.from_numpy(np.ascontiguousarray(how))).numpy()
            magnitudes = op.magnitude + (op.magnitude_std * normal if op.magnitude_std else np.zeros_like(how))
        magnitudes = magnitudes.clip(0, op.magnitude_max or auto_augment._LEVEL_DENOM)
        operations = np.where(whether <= op.prob, self._choose(which), -1).astype(np.int32)
        rows = zip(operations.ravel().tolist(), magnitudes.ravel().tolist(), (way > 0.5).ravel().tolist(), strict=True)
        arguments = np.array([self._argument(*row) for row in rows], dtype=np.float64)
        return operations, arguments.reshape(operations.shape)

    def _choose(self, u: np.ndarray) -> np.ndarray:
        """(n, L) operations: uniform with replacement or, with timm's weights, in proportion to them and without."""
        if self._weights is None:
            return np.floor(u * len(self._ops))
        weights = np.tile(self._weights, (len(u), 1))
        chosen = np.empty(u.shape, dtype=np.int64)
        for layer in range(self.num_layers):
            steps = weights.cumsum(axis=1)
            chosen[:, layer] = (steps <= u[:, layer, None] * steps[:, -1:]).sum(axis=1)
            np.put_along_axis(weights, chosen[:, layer, None], 0.0, axis=1)
        return chosen

    def _argument(self, operation: int, magnitude: float, negated: bool) -> float:
        of_level = self._argument_of[operation][negated]
        return 0.0 if operation < 0 or of_level is None else of_level(magnitude, self._ops[operation].hparams)[0]

    def matrices(self, operations: np.ndarray, arguments: np.ndarray, size: int) -> np.ndarray:
        """(n, L, 6) float64, where a pixel of the changed picture comes from: `x' = a x + b y + c, y' = d x + e y + f`.

        As PIL takes them: coordinates of pixels' centres in pixels, (0.5, 0.5) the first. The identity for operations
        that move nothing.

        Args:
            operations: (n, L), of `draw`.
            arguments: (n, L), of `draw`.
            size: side of the square pictures, pixels.
        """
        found = np.tile(np.array([1.0, 0, 0, 0, 1, 0]), (*operations.shape, 1))
        for number, name in enumerate(self.names):
            here, value = operations == number, arguments[operations == number]
            if name == "Rotate":
                cos, sin, half = np.cos(np.radians(value)), np.sin(np.radians(value)), size / 2
                shift = half - half * cos
                found[here] = np.stack([cos, -sin, shift + half * sin, sin, cos, shift - half * sin], axis=1)
            elif name in _MOVES:
                at, scale = _MOVES[name]
                found[here, at] = value * (size if scale else 1)
        return found

    def apply(self, image: Image.Image, operations: np.ndarray, arguments: np.ndarray) -> Image.Image:
        """The image after all layers.

        Args:
            image: RGB.
            operations: (L,), a row of what `draw` gave.
            arguments: (L,), the same row.
        """
        for operation, argument in zip(operations.astype(int).tolist(), arguments.tolist(), strict=True):
            if operation < 0:
                continue
            op = self._ops[operation]
            number = int(argument) if argument.is_integer() else argument  # tables and numbers of bits want integers
            if op.aug_fn is auto_augment.posterize and number < 1:
                image = Image.new("RGB", image.size)  # as older Pillows had it: newer ones refuse to keep no bit
            else:
                image = op.aug_fn(image, *(() if op.level_fn is None else (number,)), **op.kwargs)
        return image


def _with_sign(of_level: Callable | None, negated: bool) -> Callable | None:
    """timm's function from a magnitude to arguments, its coin for the sign replaced by `negated`.

    The same code with another `_randomly_negate` in reach: nothing in timm's module changes.
    """
    if not isinstance(of_level, FunctionType):  # none, or a partial that has no sign
        return of_level
    names = {**vars(auto_augment), "_randomly_negate": lambda v: -v if negated else v}
    return FunctionType(of_level.__code__, names, of_level.__name__, of_level.__defaults__)
