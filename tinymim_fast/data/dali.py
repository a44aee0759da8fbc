"""The fast loader: NVIDIA DALI applies the parameters of a plan, on the GPU or, without one, on the CPU.

One graph serves both. Files are read and decoded once for both views, and only the crop is decoded. Sizes,
anchors and jitter come from the plan, so the views agree with PIL and torchvision up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def

from tinymim_fast.data.augment import BRIGHTNESS, CONTRAST
from tinymim_fast.data.errors import DataError, ImageError, name_some
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
        DataError: a file can't be decoded in evaluation, or hardly any in training; names it.
    """
    is_gpu = device.type == "cuda"

    def build(files: Iterable, inputs: Iterable, **options) -> Pipeline:
        return (_train_graph if isinstance(plan, TrainPlan) else _eval_graph)(
            files=files,
            inputs=inputs,
            plan=plan,
            normalize={"mean": [255 * m for m in mean], "std": [255 * s for s in std], "output_layout": "CHW"},
            is_gpu=is_gpu,
            device_id=device.index if is_gpu else None,
            exec_dynamic=True,
            **options,
        )

    done = 0
    while done < len(numbers):  # once, and again after each batch with a file that can't be decoded
        pipeline = build(
            (_files(plan, number) for number in numbers[done:]),
            (_inputs(plan, number) for number in numbers[done:]),
            batch_size=plan.batch_size,
            num_threads=max(1, workers),
            prefetch_queue_depth=prefetch,
        )
        failure = None
        try:
            while failure is None and done < len(numbers):
                try:
                    # outputs on the consumer's stream: a buffer is freed in its order, after the kernels that read it
                    outputs = pipeline.run(torch.cuda.current_stream(device) if is_gpu else None)
                except RuntimeError as error:
                    failure = error
                    continue
                # the dynamic executor never reuses a buffer that is still referred to, so no copy is needed
                yield tuple(torch.from_dlpack(output.as_tensor()) for output in outputs)
                done += 1
        finally:
            pipeline._shutdown()  # now, not when the last traceback that holds the pipeline is dropped
        if failure is not None:
            _single_out(plan, numbers[done], build, failure)


def _single_out(plan: TrainPlan | EvalPlan, number: int, build: Callable[..., Pipeline], failure: RuntimeError) -> None:
    """Put the samples of a batch that can't be decoded into `plan.bad`: DALI fails a batch without saying which.

    Raises:
        DataError: in evaluation, or where none fails alone.
    """
    read_ids = plan.read_ids(number).tolist()
    damage = {}
    for sample_id in read_ids:
        try:
            plan.index.read_image(sample_id)
        except ImageError as error:
            damage[sample_id] = error
    if not damage:  # what PIL can decode is not what DALI can
        for i in _failing_alone(plan, number, build):
            file, cause = plan.index.file(read_ids[i]), _cause(failure)
            damage[read_ids[i]] = ImageError(
                f"got {file}, which PIL can decode and DALI can't: {cause}; convert it or use --loader torchvision",
                f"DALI: {cause}",
            )
    if not damage:
        names = name_some(plan.index.file(sample_id) for sample_id in read_ids)
        raise DataError(f"DALI could not decode a batch of these files, though each of them alone: {names}\n{failure}")
    if isinstance(plan, EvalPlan):
        raise next(iter(damage.values()))
    plan.bad.update((sample_id, error.reason) for sample_id, error in damage.items())


def _failing_alone(plan: TrainPlan | EvalPlan, number: int, build: Callable[..., Pipeline]) -> list[int]:
    """Positions in a batch of the samples that fail when they go alone through the same graph."""
    files, inputs = _files(plan, number), _inputs(plan, number)
    failing, start = [], 0
    while start < len(files):
        singles = range(start, len(files))
        pipeline = build(
            ([files[i]] for i in singles),
            (tuple(array[i : i + 1] for array in inputs) for i in singles),
            batch_size=1,
            num_threads=1,
            prefetch_queue_depth=1,
        )
        try:
            for i in singles:
                start = i + 1
                pipeline.run()
        except RuntimeError:  # a pipeline is of no use after it
            failing.append(i)
        finally:
            pipeline._shutdown()
    return failing


def _cause(error: RuntimeError) -> str:
    """The line that says what happened, of the many that say where."""
    lines = str(error).rpartition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), "unknown error")


def _files(plan: TrainPlan | EvalPlan, number: int) -> list[np.ndarray] | np.ndarray:
    """Views of files in shards, n of (bytes,) uint8, or names of files for DALI to read, (n, bytes) uint8."""
    index, read_ids = plan.index, plan.read_ids(number).tolist()
    if index.shards:
        return [index.encoded(i) for i in read_ids]
    folder = os.path.join(os.fsencode(index.root), b"")
    names = np.array([folder + os.fsencode(index.paths[i]) for i in read_ids])
    # one array with zeros behind the names, where opening stops: 2 us an image instead of 8 for a list
    return names.view(np.uint8).reshape(len(names), -1)


def _inputs(plan: TrainPlan | EvalPlan, number: int) -> tuple[np.ndarray, ...]:
    """The parameters of a batch as arrays (n, ...)."""
    return _train_inputs(plan, number) if isinstance(plan, TrainPlan) else _eval_inputs(plan, number)


def _train_inputs(plan: TrainPlan, number: int) -> tuple[np.ndarray, ...]:
    p = plan.params(number)
    crop = (np.stack([p.top, p.left], axis=1), np.stack([p.height, p.width], axis=1))  # (n, 2) each
    inputs = (*crop, p.flip.astype(np.int32))
    if plan.views == 1:
        return inputs
    order = np.ascontiguousarray(p.jitter_order.T)  # (stages, n)
    factor = np.take_along_axis(p.jitter.T, order, axis=0).astype(np.float32)  # (stages, n)
    # saturation f: x <- f x + (1 - f) grey(x), as a matrix per sample, (stages, n, 3, 3)
    f = factor[..., None, None]
    matrix = (f * np.eye(3) + (1 - f) * np.tile(_GREY, (3, 1))).astype(np.float32)
    return (*inputs, *order, *factor, *matrix)


def _eval_inputs(plan: EvalPlan, number: int) -> tuple[np.ndarray, ...]:
    p = plan.params(number)
    size, anchor = np.stack([p.height, p.width], axis=1), np.stack([p.top, p.left], axis=1)
    return size.astype(np.float32), anchor


def _decode_options(is_gpu: bool) -> dict:
    return {
        "device": "mixed" if is_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }


def _encoded(files: Iterable, plan: TrainPlan | EvalPlan):
    if plan.index.shards:  # decoders read the memory map: no copy here, and page faults are theirs
        return fn.external_source(files, no_copy=True)
    return fn.io.file.read(fn.external_source(files))


_RESIZE_OPTIONS = {"interp_type": types.INTERP_CUBIC, "antialias": True}


@pipeline_def(enable_conditionals=True)
def _train_graph(files: Iterable, inputs: Iterable, plan: TrainPlan, normalize: dict, is_gpu: bool):
    num_inputs = 3 + (3 * _NUM_STAGES if plan.views == 2 else 0)
    start, shape, flip, *jitter = fn.external_source(inputs, num_outputs=num_inputs)
    image = fn.decoders.image_slice(
        _encoded(files, plan), start=start, shape=shape, axes=[0, 1], **_decode_options(is_gpu)
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
def _eval_graph(files: Iterable, inputs: Iterable, plan: EvalPlan, normalize: dict, is_gpu: bool):
    size, anchor = fn.external_source(inputs, num_outputs=2)
    image = fn.decoders.image(_encoded(files, plan), **_decode_options(is_gpu))
    image = fn.resize(image, size=size, **_RESIZE_OPTIONS)
    image = fn.slice(image, start=anchor, shape=[plan.img_size, plan.img_size], axes=[0, 1])
    return fn.crop_mirror_normalize(image, **normalize)
