"""k-nearest-neighbour accuracy of a checkpoint's features: what it learnt, without training a classifier.

python -m tinymim_fast.evaluate CHECKPOINT --data-path DIR     (DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg)
torchrun --nproc-per-node 8 -m tinymim_fast.evaluate CHECKPOINT --data-path DIR
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tinymim_fast.data import build_eval_loader, find_images
from tinymim_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, EvalView
from tinymim_fast.errors import EXIT_INPUT, InputError, flags
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.models.vit import create_vit, freeze, init_mae_style


@torch.inference_mode()
def extract_features(
    taps: Taps,
    data_path: str,
    split: str,
    *,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, C), fp32 on the CPU, and labels (n,) of this rank's part of a split.

    A feature is the mean over patch tokens at the place that is tapped. What the last block's qkv projection reads is, for a
    distilled student, the last thing that the relation loss trained.
    """
    (place,) = taps.places
    index = find_images(data_path, split=split, workers=workers)
    features, labels = [torch.empty(0, taps.widths[place])], [torch.empty(0, dtype=torch.int64)]
    view = EvalView(img_size=img_size, resize_size=round(img_size * 256 / 224), mean=mean, std=std)
    with build_eval_loader(
        index, view, batch_size=batch_size, rank=rank, world_size=world_size, device=device, workers=workers
    ) as loader:
        for images, targets, _ in loader:
            tokens = taps(images)[place][:, taps.num_prefix_tokens :]
            features.append(tokens.float().mean(1).cpu())
            labels.append(torch.as_tensor(targets).cpu())
    return torch.cat(features), torch.cat(labels)


def gather(parts: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Each tensor with the rows of all ranks, in their order, on rank 0; no rows elsewhere. Collective, on the host."""
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


def knn_accuracy(
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy, 0 to 1, of the weighted k-NN classifier of DINO (arXiv 2104.14294).

    Each of the `k` nearest training features votes for its class with `exp(cosine / temperature)`. Features are
    standardised first, by the mean and standard deviation of each channel over the training features.

    Args:
        train: features (n, C) and labels (n,).
        val: the same, of what is classified.
        k: neighbours.
        temperature: of the votes.
    """
    (x, y), (queries, truth) = train, val
    std, mean = torch.std_mean(x, dim=0)
    x, queries = (F.normalize((f - mean) / (std + 1e-6), dim=1) for f in (x, queries))
    num_classes = int(y.max()) + 1
    correct = 0
    for chunk, labels in zip(queries.split(1024), truth.split(1024), strict=True):
        similarity, nearest = (chunk @ x.T).topk(min(k, len(x)), dim=1)
        votes = chunk.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, y[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)


def evaluate_knn(
    checkpoint: str,
    data_path: str,
    *,
    untrained: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> float | None:
    """k-NN accuracy of a checkpoint, or of the same architecture with fresh weights; None on other ranks than 0.

    Args:
        group: ranks, of a backend that sends CPU tensors, that share the images among them; each image counts once.

    Raises:
        InputError: no checkpoint, or no such folders.
    """
    vit, info = load_encoder(checkpoint)
    img_size = info.model_kwargs["img_size"]
    if untrained:
        torch.manual_seed(seed)
        vit = create_vit(info.architecture, **info.model_kwargs)
        init_mae_style(vit, pos_embed=info.recipe.get("student_pos_embed", "sincos"))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    taps = freeze(Taps(vit, [Place("norm1", len(vit.blocks))]), torch.float32, device)
    options = {
        "img_size": img_size,
        "mean": info.recipe.get("mean", IMAGENET_MEAN),
        "std": info.recipe.get("std", IMAGENET_STD),
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "rank": dist.get_rank(group) if group else 0,
        "world_size": dist.get_world_size(group) if group else 1,
    }
    train, val = (gather(extract_features(taps, data_path, split, **options), group) for split in ("train", "val"))
    return knn_accuracy(train, val) if len(val[0]) else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a run's output folder, a checkpoint, an export, or timm:NAME")
    parser.add_argument("--data-path", required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass of a rank")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads or processes of a rank")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the DeepSpeed launcher adds it; the environment has it
    args = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", 0))
    group = None
    try:
        if "RANK" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            dist.init_process_group("gloo")
            group = dist.group.WORLD
        with flags(source="CHECKPOINT", model="CHECKPOINT"):
            accuracy = evaluate_knn(
                args.checkpoint, args.data_path, batch_size=args.batch_size, workers=args.workers, group=group
            )
    except InputError as error:
        if rank:
            time.sleep(3)  # rank 0 most likely says the same, and its exit makes the launcher end this process
        print(f"evaluate: {error}", file=sys.stderr, flush=True)
        return EXIT_INPUT
    finally:
        if group is not None:
            dist.destroy_process_group()
    if accuracy is not None:
        print(f"k-NN accuracy: {100 * accuracy:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
