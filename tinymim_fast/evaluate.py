"""k-nearest-neighbour accuracy of a checkpoint's features: what it learnt, without training a classifier.

python -m tinymim_fast.evaluate CHECKPOINT --data-path DIR     (DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg)
torchrun --nproc-per-node 8 -m tinymim_fast.evaluate CHECKPOINT --data-path DIR
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tinymim_fast.checkpoint_flags import CHECKPOINT_FLAGS, add_checkpoint_arguments, checkpoint_arguments
from tinymim_fast.errors import EXIT_INPUT, InputError, flags

if TYPE_CHECKING:  # --help does not wait for torch
    import torch.distributed as dist

    from tinymim_fast.data.views import EvalView
    from tinymim_fast.models.model_info import ModelInfo

logger = logging.getLogger("tinymim_fast")
Value = TypeVar("Value")


def evaluate_knn(
    checkpoint: str,
    data_path: str,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    untrained: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> float | None:
    """k-NN accuracy of a checkpoint, or of the same architecture with fresh weights; None on other ranks than 0.

    Images are made as the checkpoint's were: size, mean, standard deviation and crop are its own where it says them.

    Args:
        checkpoint: see `load_encoder`, as `model`, `model_kwargs` and `key`.
        data_path: see `find_splits`.
        untrained: fresh weights instead of the checkpoint's.
        batch_size: images per forward pass of a rank.
        workers: decoding threads or processes of a rank.
        seed: of fresh weights.
        group: ranks, of a backend that sends CPU tensors, that share the images among them; each image counts once.

    Raises:
        InputError: no checkpoint, no such folders, labels that say nothing, or an image that can't be decoded; the
            same error on every rank.
    """
    import torch
    import torch.distributed as dist

    from tinymim_fast.evaluation import knn
    from tinymim_fast.evaluation.features import extract_features, gather_rows
    from tinymim_fast.evaluation.splits import find_splits
    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.taps import Place, Taps
    from tinymim_fast.models.vit import create_vit, freeze, init_mae_style

    vit, info = _on_all(group, lambda: load_encoder(checkpoint, model=model, model_kwargs=model_kwargs, key=key))
    splits = _on_all(group, lambda: find_splits(data_path, workers=workers))
    if untrained:
        torch.manual_seed(seed)
        vit = create_vit(info.architecture, **info.model_kwargs)
        init_mae_style(vit, pos_embed=info.recipe.get("student_pos_embed", "sincos"))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    taps = freeze(Taps(vit, [Place("norm1", len(vit.blocks))]), torch.float32, device)
    options = {
        "batch_size": batch_size,
        "workers": workers,
        "device": device,
        "rank": dist.get_rank(group) if group else 0,
        "world_size": dist.get_world_size(group) if group else 1,
    }
    view = eval_view(info, checkpoint)
    parts = [_on_all(group, lambda split=split: extract_features(taps, split, view, **options)) for split in splits]
    train, val = (gather_rows(part, group) for part in parts)
    return knn.knn_accuracy(train, val) if len(val[0]) else None


def eval_view(info: ModelInfo, checkpoint: str) -> EvalView:
    """The images that a model expects; says what was assumed where its file says nothing."""
    from tinymim_fast.data.views import EvalView
    from tinymim_fast.models.preprocessing import Preprocessing

    expects = info.expects
    if expects is None:
        expects = Preprocessing()
        logger.warning("%s does not say how its images were made; assumed: %s", checkpoint, expects)
    if expects.interpolation != "bicubic":
        logger.warning(
            "%s: images resized by %s were expected; resized bicubically here", checkpoint, expects.interpolation
        )
    img_size = info.model_kwargs["img_size"]
    return EvalView(img_size=img_size, resize_size=expects.resize_size(img_size), mean=expects.mean, std=expects.std)


def _on_all(group: dist.ProcessGroup | None, make: Callable[[], Value]) -> Value:
    """What `make` gives on this rank, once it gave something on all; an `InputError` of one is raised on all."""
    value, error = None, None
    try:
        value = make()
    except InputError as caught:
        error = caught
    errors = [error]
    if group is not None:
        import torch.distributed as dist

        errors = [None] * dist.get_world_size(group)
        dist.all_gather_object(errors, error, group=group)
    for error in errors:
        if error is not None:
            raise error
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.evaluate", description=__doc__.split("\n")[0])
    add_checkpoint_arguments(parser)
    parser.add_argument("--data-path", required=True, help="folder with train/<class>/ and val/<class>/")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass of a rank")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads or processes of a rank")
    # the DeepSpeed launcher adds it; the environment has it
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    import torch
    import torch.distributed as dist

    from tinymim_fast.distributed import complete_environment, join

    logging.basicConfig(format="evaluate: %(message)s", level=logging.WARNING)
    rank, group = 0, None
    try:
        with flags(**CHECKPOINT_FLAGS, data_path="--data-path"):
            options = checkpoint_arguments(args)
            if "RANK" in os.environ:
                local_rank = complete_environment()
                if torch.cuda.is_available():
                    torch.cuda.set_device(local_rank % torch.cuda.device_count())
                join("gloo")
                rank, group = dist.get_rank(), dist.group.WORLD
                logger.setLevel(logging.ERROR if rank else logging.NOTSET)
            accuracy = evaluate_knn(
                args.checkpoint,
                args.data_path,
                **options,
                batch_size=args.batch_size,
                workers=args.workers,
                group=group,
            )
    except InputError as error:
        if not rank:  # every rank has it
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
