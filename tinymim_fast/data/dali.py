"""The fast loader: NVIDIA DALI applies the parameters of a plan, on the GPU or, without one, on the CPU.

One graph serves both. Files are read and decoded once for both views, and only the crop is decoded. Sizes,
anchors and jitter come from the plan, so the views agree with PIL and torchvision up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def

from tinymim_fast.data.augment import BRIGHTNESS, CONTRAST
from tinymim_fast.data.errors import DataError, name_some
from tinymim_fast.data.plan import EvalPlan, TrainPlan

_GREY = np.array([0.299, 0.587, 0.114])  # PIL's "L"
_TRUNCATE = -0.499  # DALI rounds to uint8, PIL's blend truncates
_NUM_STAGES = 3  # brightness, contrast, saturation


def batches(
    plan: TrainPlan | EvalPlan,
    numbers: Sequence[int],
    *,
    device: torch.device,
    workers: int,
    prefetch: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Float32 views (B, 3, S, S) on `device` for each batch number; `workers` decoding threads, at least one.

    Raises:
        DataError: a file can't be decoded; names it.
    """
    is_train = isinstance(plan, TrainPlan)
    define, inputs = (_train_graph, _train_inputs) if is_train else (_eval_graph, _eval_inputs)
    pipeline = define(
        source=(inputs(plan, number) for number in numbers),
        plan=plan,
        normalize={"mean": [255 * m for m in mean], "std": [255 * s for s in std], "output_layout": "CHW"},
        is_gpu=device.type == "cuda",
        batch_size=plan.batch_size,
        num_threads=max(1, workers),
        device_id=device.index if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    try:
        for number in numbers:
            try:
                # outputs on the consumer's stream: a buffer is freed in its order, after the kernels that read it
                outputs = pipeline.run(torch.cuda.current_stream(device) if device.type == "cuda" else None)
            except RuntimeError as error:
                raise _blame(plan, number, error) from error
            # the dynamic executor never reuses a buffer that is still referred to, so no copy is needed
            yield tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
    finally:
        pipeline._shutdown()  # now, not when the last traceback that holds the pipeline is dropped


def _blame(plan: TrainPlan | EvalPlan, number: int, error: RuntimeError) -> DataError:
    """DALI does not say which file broke a batch, so decode the batch again with PIL."""
    sample_ids = plan.sample_ids(number)
    for sample_id in sample_ids:
        try:
            plan.index.read_image(sample_id)
        except DataError as damaged:
            return damaged
    files = name_some(plan.index.file(sample_id) for sample_id in sample_ids)
    return DataError(f"DALI could not decode a batch of these files: {files}\n{error}")


def _file_names(plan: TrainPlan | EvalPlan, number: int) -> list[np.ndarray]:
    files = (plan.index.file(sample_id).encode(errors="surrogateescape") for sample_id in plan.sample_ids(number))
    return [np.frombuffer(file, dtype=np.uint8) for file in files]


def _train_inputs(plan: TrainPlan, number: int) -> tuple:
    p = plan.params(number)
    crop = (np.stack([p.top, p.left], axis=1), np.stack([p.height, p.width], axis=1))  # (n, 2) each
    inputs = (_file_names(plan, number), *crop, p.flip.astype(np.int32))
    if plan.views == 1:
        return inputs
    order = np.ascontiguousarray(p.jitter_order.T)  # (stages, n)
    factor = np.take_along_axis(p.jitter.T, order, axis=0).astype(np.float32)  # (stages, n)
    # saturation f: x <- f x + (1 - f) grey(x), as a matrix per sample, (stages, n, 3, 3)
    f = factor[..., None, None]
    matrix = (f * np.eye(3) + (1 - f) * np.tile(_GREY, (3, 1))).astype(np.float32)
    return (*inputs, *order, *factor, *matrix)


def _eval_inputs(plan: EvalPlan, number: int) -> tuple:
    p = plan.params(number)
    size, anchor = np.stack([p.height, p.width], axis=1), np.stack([p.top, p.left], axis=1)
    return _file_names(plan, number), size.astype(np.float32), anchor


def _decode_options(is_gpu: bool) -> dict:
    return {
        "device": "mixed" if is_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }


_RESIZE_OPTIONS = {"interp_type": types.INTERP_CUBIC, "antialias": True}


@pipeline_def(enable_conditionals=True)
def _train_graph(source, plan: TrainPlan, normalize: dict, is_gpu: bool):
    num_inputs = 4 + (3 * _NUM_STAGES if plan.views == 2 else 0)
    file_name, start, shape, flip, *jitter = fn.external_source(source, num_outputs=num_inputs)
    image = fn.decoders.image_slice(
        fn.io.file.read(file_name), start=start, shape=shape, axes=[0, 1], **_decode_options(is_gpu)
    )
    image = fn.resize(image, size=[plan.img_size, plan.img_size], **_RESIZE_OPTIONS)
    teacher_view = fn.crop_mirror_normalize(image, mirror=flip, **normalize)
    if plan.views == 1:
        return teacher_view
    orders, factors, matrices = jitter[:_NUM_STAGES], jitter[_NUM_STAGES : 2 * _NUM_STAGES], jitter[-_NUM_STAGES:]
    for order, factor, matrix in zip(orders, factors, matrices):
        # a condition on a per-sample value splits the batch, so each sample pays for its own operation only
        if order == BRIGHTNESS:
            image = fn.brightness_contrast(image, brightness=factor, brightness_shift=_TRUNCATE / 255)
        elif order == CONTRAST:
            grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
            image = fn.brightness_contrast(
                image,
                contrast=factor,
                contrast_center=fn.reductions.mean(grey).cpu(),
                brightness_shift=_TRUNCATE / 255,
            )
        else:
            image = fn.coord_transform(image, M=matrix, T=_TRUNCATE, dtype=types.UINT8)
    return teacher_view, fn.crop_mirror_normalize(image, mirror=flip, **normalize)


@pipeline_def
def _eval_graph(source, plan: EvalPlan, normalize: dict, is_gpu: bool):
    file_name, size, anchor = fn.external_source(source, num_outputs=3)
    image = fn.decoders.image(fn.io.file.read(file_name), **_decode_options(is_gpu))
    image = fn.resize(image, size=size, **_RESIZE_OPTIONS)
    image = fn.slice(image, start=anchor, shape=[plan.img_size, plan.img_size], axes=[0, 1])
    return fn.crop_mirror_normalize(image, **normalize)
