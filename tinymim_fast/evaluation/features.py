"""Features of the images of one split, shared among ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from tinymim_fast.data import ImageIndex, build_eval_loader
from tinymim_fast.data.loader import LoaderName
from tinymim_fast.data.views import EvalView
from tinymim_fast.models.taps import Taps


@torch.inference_mode()
def extract_features(
    taps: Taps,
    index: ImageIndex,
    view: EvalView,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    loader: LoaderName = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C), fp32 on the CPU, and labels (n,) of this rank's part of a split.

    A feature is the mean over patch tokens at the place that is tapped. What the last block's qkv projection reads is,
    for a distilled student, the last thing that the relation loss trained.

    Args:
        taps: on `device`, of one place.
        index: the images and labels of the split.
        view: what is made of an image.
        batch_size: images per forward pass of this rank.
        workers: decoding threads or processes of this rank.
        device: where the model is.
        rank: this process among all that share the images; each image comes once over all of them.
        world_size: how many those are.
        loader: see `build_eval_loader`.
    """
    (place,) = taps.places
    features, labels = [torch.empty(0, taps.widths[place])], [torch.empty(0, dtype=torch.int64)]
    with build_eval_loader(
        index,
        view,
        batch_size=batch_size,
        loader=loader,
        rank=rank,
        world_size=world_size,
        device=device,
        workers=workers,
    ) as batches:
        for images, targets, _ in batches:
            tokens = taps(images)[place][:, taps.num_prefix_tokens :]
            features.append(tokens.float().mean(1).cpu())
            labels.append(torch.as_tensor(targets).cpu())
    return torch.cat(features), torch.cat(labels)


def gather_rows(parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Each tensor with the rows of all ranks, in their order, on rank 0; no rows elsewhere. Collective, on the host.

    Args:
        parts: of this rank, on the CPU, with equally many rows.
        group: all ranks, of a backend that sends CPU tensors; None for a process alone.
    """
    if group is None:
        return list(parts)
    rank, counts = dist.get_rank(group), [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, len(parts[0]), group=group)
    whole = []
    for part in parts:
        if rank:
            dist.send(part.contiguous(), 0, group)
            whole.append(part[:0])
        else:
            rows = [part, *(part.new_empty(count, *part.shape[1:]) for count in counts[1:])]
            for source, received in enumerate(rows[1:], 1):
                dist.recv(received, source, group)
            whole.append(torch.cat(rows))
    return whole
