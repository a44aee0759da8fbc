"""Token relations to look at: rows of the relation of two projections, of several models on one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.models.vision_transformer import VisionTransformer

from tinymim_fast.errors import InputError
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.models.taps import Place, Taps


def relation_rows(qkv: torch.Tensor, relation: str, heads: int) -> torch.Tensor:
    """How much each token relates to each other one: softmax over keys of x y^T / sqrt(D), a head at a time.

    Args:
        qkv: packed [q | k | v], (B, N, 3 C), any floating dtype.
        relation: the letters of x and y: "qk", "vv", "qq" or "kk".
        heads: relation heads; heads are consecutive groups of D = C / heads channels.

    Returns:
        (B, heads, N, N), fp32 (fp64 for fp64), each row a distribution over keys.
    """
    parts = dict(zip("qkv", qkv.to(torch.promote_types(qkv.dtype, torch.float32)).chunk(3, dim=-1), strict=True))
    x, y = (parts[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in relation)
    return torch.softmax(x @ y.mT * x.shape[-1] ** -0.5, dim=-1)


def head_kl(rows_t: torch.Tensor, rows_s: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(teacher row || student row), (B, heads) in nats, from `relation_rows` (B, heads, N, N)."""
    tiny = torch.finfo(rows_s.dtype).tiny  # a probability that underflowed counts as the smallest there is
    return (torch.xlogy(rows_t, rows_t) - rows_t * rows_s.clamp_min(tiny).log()).sum(-1).mean(-1)


def telling_queries(rows: torch.Tensor, count: int) -> list[int]:
    """Patches whose rows differ most from the mean row and from one another, by farthest points.

    Args:
        rows: (N, N), of patches only.
        count: how many, at most N.

    Returns:
        Row numbers, each once.
    """
    distance = (rows - rows.mean(0)).norm(dim=-1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).norm(dim=-1))
        distance[chosen] = -1
    return chosen


@dataclass(frozen=True, kw_only=True)
class Viewed:
    """A model whose relations are looked at.

    Args:
        title: what it is called.
        vit: the model; put into evaluation mode.
        block: 1-based, whose projections are related.
        expects: mean and standard deviation of its images.
    """

    title: str
    vit: VisionTransformer
    block: int
    expects: Preprocessing

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.vit.patch_embed.grid_size

    def projection(self, image: Image.Image) -> torch.Tensor:
        """Its packed projection of an image that is square by now, (1, N, 3 C), fp32."""
        pixels = torch.from_numpy(np.array(image.resize(self.vit.patch_embed.img_size[::-1], Image.BICUBIC)) / 255)
        mean, std = torch.tensor(self.expects.mean), torch.tensor(self.expects.std)
        device = next(self.vit.parameters()).device
        batch = ((pixels.float() - mean) / std).permute(2, 0, 1)[None].to(device)
        with torch.inference_mode():
            (qkv,) = Taps(self.vit.eval(), [Place("qkv", self.block)])(batch).values()
        return qkv.float().cpu()


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What several models make of one image.

    Args:
        image: (height, width, 3), 0..255, square.
        rows: relations between patches by relation, then by model, the teacher first: (heads, patches, patches), each
            row what is left of a distribution without the tokens before the patches.
        kl: KL(teacher || model), nats, mean over all tokens, by relation and student: (heads,).
    """

    image: np.ndarray
    rows: Mapping[str, Mapping[str, torch.Tensor]]
    kl: Mapping[str, Mapping[str, torch.Tensor]]


def check_viewed(teacher: Viewed, students: Sequence[Viewed], heads: int) -> None:
    """Refuse models whose relations can't be laid side by side.

    Raises:
        InputError: other grids of patches, or heads that don't divide a width; argument "heads" of these.
    """
    for model in (teacher, *students):
        width = model.vit.embed_dim
        if width % heads:
            raise InputError(f"got {heads}, want a number that divides {model.title}'s width {width}", argument="heads")
        if model.grid != teacher.grid:
            ours, theirs = (f"{m.title} has {m.grid[0]} x {m.grid[1]} patches" for m in (model, teacher))
            raise InputError(f"{ours}, and {theirs}; want one grid")


def compare(
    image: Image.Image, teacher: Viewed, students: Sequence[Viewed], relations: Sequence[str], heads: int
) -> Compared:
    """Each model's relations on the largest square in the middle of an image.

    Where models have other tokens before their patches, all are compared on the patches alone.

    Args:
        image: RGB.
        teacher: what the others are measured against.
        students: any number.
        relations: pairs of the letters q, k and v.
        heads: of the relations.

    Raises:
        InputError: see `check_viewed`.
    """
    check_viewed(teacher, students, heads)
    side = max(teacher.vit.patch_embed.img_size[0], 224)
    square = ImageOps.fit(image, (side, side), Image.BICUBIC)
    models = (teacher, *students)
    prefixes = {model.title: model.vit.num_prefix_tokens for model in models}
    differ = len(set(prefixes.values())) > 1
    rows: dict[str, dict[str, torch.Tensor]] = {relation: {} for relation in relations}
    kl: dict[str, dict[str, torch.Tensor]] = {relation: {} for relation in relations}
    whole: dict[str, torch.Tensor] = {}  # the teacher's, tokens before the patches included
    for model in models:
        prefix, qkv = prefixes[model.title], model.projection(square)
        if differ:
            prefix, qkv = 0, qkv[:, prefix:]
        for relation in relations:
            found = relation_rows(qkv, relation, heads)
            if model is teacher:
                whole[relation] = found
            else:
                kl[relation][model.title] = head_kl(whole[relation], found)[0]
            rows[relation][model.title] = found[0, :, prefix:, prefix:]
    return Compared(image=np.asarray(square), rows=rows, kl=kl)
