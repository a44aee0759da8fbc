"""What a checkpoint is worth: its classifier's accuracy, on ImageNet's other test sets too, or its features'.

python -m tinymim_fast.evaluate CHECKPOINT --data-path DIR     (DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg)
python -m tinymim_fast.evaluate CHECKPOINT --data-path DIR --metric top1 knn linear --output-dir DIR
torchrun --nproc-per-node 8 -m tinymim_fast.evaluate CHECKPOINT --data-path DIR
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.checkpoint_flags import CHECKPOINT_FLAGS, add_checkpoint_arguments, checkpoint_arguments
from tinymim_fast.errors import EXIT_INPUT, InputError, end_process, flags
from tinymim_fast.evaluation.report import METRICS, check_folder, lines, write_report

if TYPE_CHECKING:  # --help does not wait for torch
    import torch.distributed as dist
    from timm.models.vision_transformer import VisionTransformer

    from tinymim_fast.data import ImageIndex
    from tinymim_fast.data.views import EvalView
    from tinymim_fast.evaluation.ranks import Share
    from tinymim_fast.models.model_info import ModelInfo

logger = logging.getLogger("tinymim_fast")
FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "data_path",
        "metric",
        "crop_pct",
        "class_map",
        "real_labels",
        "make_corruptions",
        "nb_knn",
        "batch_size",
        "workers",
        "output_dir",
    )
}


def evaluate(
    checkpoint: str,
    data_path: str,
    *,
    metrics: Sequence[str] = ("knn",),
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    crop_pct: float | None = None,
    class_map: str | None = None,
    real_labels: str | None = None,
    make_corruptions: str | None = None,
    nb_knn: Sequence[int] = (20,),
    untrained: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """What a checkpoint is worth, by several metrics; everything is checked before the first image is decoded.

    Images are made as the checkpoint's were: size, mean, standard deviation and crop are its own where it says them.

    Args:
        checkpoint: see `load_encoder`, as `model`, `model_kwargs` and `key`.
        data_path: folder with train/<class>/ and val/<class>/, and the test sets; see `find_splits`, `prepare`.
        metrics: any of `report.METRICS`: of the classifier, or "knn" and "linear" of the features.
        crop_pct: side of the centre crop per short side of the resized image; default: the checkpoint's, else 224/256.
        class_map: file with the names of the classifier's outputs, a line each; default: the checkpoint's.
        real_labels: ReaL's real.json; default: timm's copy.
        make_corruptions: folder to make of the validation images for "c", where there is no ImageNet-C.
        nb_knn: numbers of neighbours.
        untrained: fresh weights instead of the checkpoint's.
        batch_size: images per forward pass of a rank.
        workers: decoding threads or processes of a rank.
        seed: of fresh weights, and of the images held out by the linear probe.
        group: ranks, of a backend that sends CPU tensors, that share the images among them; each image counts once.

    Returns:
        The checkpoint, its model, its images, versions, and `results` by metric; those of the features on rank 0 only.

    Raises:
        InputError: no checkpoint or no classifier in it, no such folders, classes that aren't the classifier's, labels
            that say nothing, or an image that can't be decoded; the same error on every rank.
    """
    import timm
    import torch

    from tinymim_fast.evaluation.classes import load_with_head
    from tinymim_fast.evaluation.metrics import OF_CLASSIFIER, Sources, prepare, read_class_map
    from tinymim_fast.evaluation.ranks import Share
    from tinymim_fast.evaluation.splits import find_splits
    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.vit import create_vit, freeze, init_mae_style

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    share = Share(device, batch_size, workers, group)
    of_classifier = [metric for metric in metrics if metric in OF_CLASSIFIER]
    of_features = [metric for metric in metrics if metric not in OF_CLASSIFIER]
    options = {"model": model, "model_kwargs": model_kwargs, "key": key}
    if of_classifier:
        names = share.on_all(lambda: read_class_map(class_map)) if class_map else None
        vit, info, head = share.on_all(lambda: load_with_head(checkpoint, **options, class_names=names))
    else:
        vit, info = share.on_all(lambda: load_encoder(checkpoint, **options))
    if untrained:
        torch.manual_seed(seed)
        vit = create_vit(info.architecture, **info.model_kwargs)
        init_mae_style(vit, pos_embed=info.recipe.get("student_pos_embed", "sincos"))
    sources = Sources(data_path, real_labels, make_corruptions)
    runs = share.on_all(lambda: prepare(of_classifier, vit, head, share, sources)) if of_classifier else {}
    splits = share.on_all(lambda: find_splits(data_path, workers=workers)) if of_features else None
    view = share.on_all(lambda: eval_view(info, checkpoint, crop_pct=crop_pct))
    freeze(vit, torch.float32, device)
    results = {metric: run(view) for metric, run in runs.items()}
    if splits:
        results |= _of_features(of_features, vit, splits, view, share, nb_knn=nb_knn, seed=seed)
    return {
        "checkpoint": checkpoint,
        "model": {"architecture": info.architecture, "kind": info.kind, "step": info.step, **info.head_layout},
        "images": {name: getattr(view, name) for name in ("img_size", "resize_size", "mean", "std")},
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "ranks": share.world_size,
        "results": results,
    }


def _of_features(
    metrics: Sequence[str],
    vit: VisionTransformer,
    splits: tuple[ImageIndex, ImageIndex],
    view: EvalView,
    share: Share,
    *,
    nb_knn: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Results of "knn" and "linear", on rank 0; nothing elsewhere."""
    from tinymim_fast.evaluation import knn, linear_probe
    from tinymim_fast.evaluation.features import extract_features, gather_rows
    from tinymim_fast.models.taps import Place, Taps

    taps = Taps(vit, [Place("norm1", len(vit.blocks))])
    parts = [share.on_all(lambda split=split: extract_features(taps, split, view, **share.loading)) for split in splits]
    train, val = (gather_rows(part, share.group) for part in parts)
    if share.rank:
        return {}
    results: dict[str, Any] = {}
    if "knn" in metrics:
        num = len(val[0])
        results["knn"] = {
            str(k): {"num_images": num, "top1_correct": right, "top1": 100 * right / num}
            for k, right in knn.knn_correct(train, val, ks=nb_knn).items()
        }
    if "linear" in metrics:
        num_classes = len(splits[0].class_names)
        results["linear"] = linear_probe.linear_probe(
            train, val, num_classes=num_classes, seed=seed, device=share.device
        )
    return results


def evaluate_knn(checkpoint: str, data_path: str, **options: Any) -> float | None:
    """k-NN accuracy, 0 to 1, of a checkpoint, or of the same architecture with fresh weights; None off rank 0.

    Args:
        checkpoint: see `evaluate`, as `data_path`.
        data_path: see `evaluate`.
        **options: of `evaluate`.

    Raises:
        InputError: see `evaluate`.
    """
    by_k = evaluate(checkpoint, data_path, metrics=("knn",), **options)["results"].get("knn")
    if by_k is None:
        return None
    (of_k,) = by_k.values()
    return of_k["top1_correct"] / of_k["num_images"]


def eval_view(info: ModelInfo, checkpoint: str, *, crop_pct: float | None = None) -> EvalView:
    """The images that a model expects; says what was assumed where its file says nothing.

    Args:
        info: of the model.
        checkpoint: for messages.
        crop_pct: instead of the model's.

    Raises:
        InputError: a crop that can't be; argument "crop_pct".
    """
    from tinymim_fast.data.views import INTERPOLATIONS, EvalView
    from tinymim_fast.models.preprocessing import Preprocessing

    expects = info.expects
    if expects is None:
        expects = Preprocessing()
        logger.warning("%s does not say how its images were made; assumed: %s", checkpoint, expects)
    interpolation = expects.interpolation
    if interpolation not in INTERPOLATIONS:  # timm's "random", of training alone
        interpolation = "bicubic"
        logger.warning("%s: images resized by %s were expected; bicubically here", checkpoint, expects.interpolation)
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise InputError(f"got {crop_pct}, want a share of the resized image, at most 1", argument="crop_pct")
        expects = replace(expects, crop_pct=crop_pct)
    img_size = info.model_kwargs["img_size"]
    return EvalView(
        img_size=img_size,
        resize_size=expects.resize_size(img_size),
        mean=expects.mean,
        std=expects.std,
        interpolation=interpolation,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.evaluate", description=__doc__.split("\n")[0])
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data-path",
        required=True,
        help="folder with train/<class>/ and val/<class>/; for v2, sketch, a, r and c "
        "that set's own, or one that holds it",
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        choices=METRICS,
        default=["knn"],
        metavar="METRIC",
        help="top1 (and top-5), real, v2, sketch, a, r, c: of a classifier, on the validation images, with ReaL's "
        "labels, on ImageNet-V2, -Sketch, -A, -R, -C; knn (the default), linear: of the features",
    )
    parser.add_argument("--crop-pct", type=float, help="side of the centre crop per short side of the resized image")
    parser.add_argument("--class-map", metavar="FILE", help="names of the classifier's classes, a line each, in order")
    parser.add_argument("--real-labels", metavar="FILE", help="ReaL's real.json; default: timm's copy")
    parser.add_argument(
        "--make-corruptions", metavar="DIR", help="for c: corrupt the validation images into this folder"
    )
    parser.add_argument("--nb-knn", nargs="+", type=int, default=[20], metavar="K", help="numbers of neighbours")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="for results.json, .md and .png")
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
        with flags(**CHECKPOINT_FLAGS, **FLAGS):
            options = checkpoint_arguments(args)
            if "RANK" in os.environ:
                local_rank = complete_environment()
                if torch.cuda.is_available():
                    torch.cuda.set_device(local_rank % torch.cuda.device_count())
                join("gloo")
                rank, group = dist.get_rank(), dist.group.WORLD
                logger.setLevel(logging.ERROR if rank else logging.NOTSET)
            for name, number in {"nb_knn": min(args.nb_knn), "batch_size": args.batch_size}.items():
                if number < 1:
                    raise InputError(f"got {number}, want 1 or more", argument=name)
            if args.output_dir:
                check_folder(args.output_dir)
            found = evaluate(
                args.checkpoint,
                args.data_path,
                metrics=args.metric,
                **options,
                crop_pct=args.crop_pct,
                class_map=args.class_map,
                real_labels=args.real_labels,
                make_corruptions=args.make_corruptions,
                nb_knn=args.nb_knn,
                batch_size=args.batch_size,
                workers=args.workers,
                group=group,
            )
            if args.output_dir and not rank:
                write_report(args.output_dir, found)
        if not rank:
            print(*lines(found), sep="\n", flush=True)
        code = 0
    except InputError as error:
        if not rank:  # every rank has it
            print(f"evaluate: {error}", file=sys.stderr, flush=True)
        code = EXIT_INPUT
    if group is not None:
        # A launcher ends all ranks where one ended with an error: not before rank 0 has told it. The others wait here
        # while rank 0 classifies features, which may take hours.
        dist.monitored_barrier(group, timeout=timedelta(days=7))
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    end_process(main())
