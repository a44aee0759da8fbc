"""The fast loader: NVIDIA DALI applies the parameters of a plan, on the GPU or, without one, on the CPU.

One graph serves both, but for two operations that PyTorch and PIL do faster on a CPU. Files are read (dali_source.py)
and decoded once for both views, and only the crop is decoded. Sizes, anchors and jitter come from the plan, so the
views agree with PIL and torchvision up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as math
import nvidia.dali.types as types
import torch
import torch.nn.functional as F
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.pipeline import do_not_convert
from PIL import Image, ImageEnhance

from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.dali_source import KINDS, DaliSource
from tinymim_fast.data.draws import BRIGHTNESS, CONTRAST
from tinymim_fast.data.errors import DataError, ImageError, name_some
from tinymim_fast.data.plan import EvalPlan, TrainPlan
from tinymim_fast.data.threads import Readers

if TYPE_CHECKING:  # timm, of which most loaders need nothing
    from tinymim_fast.data.rand_augment import RandAugment

_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # PIL's "L"
_TRUNCATE = -0.499  # DALI rounds to uint8, PIL's blend truncates
_NUM_STAGES = 3  # brightness, contrast, saturation
_WARP, _AUTO_CONTRAST, _EQUALIZE, _INVERT, _POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = range(7)  # of KINDS
_COLOR, _CONTRAST, _BRIGHTNESS, _SHARPNESS, _DESATURATE, _GAUSSIAN_BLUR = range(7, len(KINDS))
_equalize = getattr(fn, "equalize", None) or fn.experimental.equalize  # older DALIs have the second name
_filter = getattr(fn, "filter", None) or fn.experimental.filter
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # PIL's ImageFilter.SMOOTH
_SAME = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
_DECODER_KWARGS = ("hw_decoder_load", "device_memory_padding", "host_memory_padding")
GPU_INTERPOLATIONS = {
    "bicubic": types.INTERP_CUBIC,
    "bilinear": types.INTERP_LINEAR,
    "lanczos": types.INTERP_LANCZOS3,
    "nearest": types.INTERP_NN,
}
_DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}  # DALI has no bfloat16


def batches(
    plan: TrainPlan | EvalPlan,
    bad_files: BadFiles,
    numbers: Sequence[int],
    *,
    device: torch.device,
    workers: int,
    prefetch: int,
    dali_kwargs: Mapping[str, float],
    waiting: Callable[[], None],
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views (B, 3, S, S) and labels, if any, on `device` for each batch number.

    `workers` threads decode, at least one; `dali_kwargs` and `waiting`: see `build_loader`.

    Raises:
        DataError: a file can't be decoded in evaluation, or hardly any in training; names it.
    """
    is_gpu = device.type == "cuda"
    if is_gpu and plan.view.interpolation not in GPU_INTERPOLATIONS:
        raise DataError(
            f"got {plan.view.interpolation}, which DALI has not on a GPU; choose the loader torchvision",
            argument="interpolation",
        )
    queue = {"prefetch_queue_depth": prefetch, **dali_kwargs}
    decoder = {key: queue.pop(key) for key in _DECODER_KWARGS if key in queue}

    def build(source: Iterable, **options) -> Pipeline:
        return (_train_graph if isinstance(plan, TrainPlan) else _eval_graph)(
            source=source,
            plan=plan,
            normalize=[
                {
                    "mean": [255 * m for m in mean],
                    "std": [255 * s for s in std],
                    "output_layout": "CHW",
                    "dtype": _DTYPES[plan.view.dtype],
                }
                for mean, std in plan.view.normalisations
            ],
            decoder={**_DECODE_OPTIONS, "device": "mixed" if is_gpu else "cpu", **decoder},
            threads=None if is_gpu else threads,
            device_id=device.index if is_gpu else None,
            exec_dynamic=True,
            **options,
        )

    num_threads = max(1, workers)
    with closing(Readers(num_threads, waiting)) as threads:
        source = DaliSource(plan, bad_files, threads, num_threads, queue["prefetch_queue_depth"] + 2)
        done = 0
        while done < len(numbers):  # once, and again after each batch with a file that can't be decoded
            pipeline = build(
                source.batches(numbers[done:]),
                batch_size=plan.batch_size,
                num_threads=num_threads,
                **queue,
            )
            failure = None
            try:
                while failure is None and done < len(numbers):
                    try:
                        # outputs on the consumer's stream: a buffer is freed after the kernels that read it
                        outputs = pipeline.run(torch.cuda.current_stream(device) if is_gpu else None)
                    except RuntimeError as error:
                        failure = error
                        continue
                    # the dynamic executor never reuses a buffer that is still referred to, so no copy is needed
                    yield tuple(torch.from_dlpack(output.as_tensor()).to(device) for output in outputs)
                    done += 1
            finally:
                pipeline._shutdown()  # now, not when the last traceback that holds the pipeline is dropped
            if failure is not None:
                _single_out(source, numbers[done], build, failure)


def _single_out(source: DaliSource, number: int, build: Callable[..., Pipeline], failure: RuntimeError) -> None:
    """Put the samples of a batch that can't be decoded into the ledger: DALI fails a batch without saying which.

    Raises:
        DataError: in evaluation, or where none fails alone.
    """
    plan, bad_files = source.plan, source.bad_files
    read_ids = plan.read_ids(number, bad_files).tolist()
    damage = {}
    for sample_id in read_ids:
        try:
            plan.index.read_image(sample_id)
        except ImageError as error:
            damage[sample_id] = error
    if not damage:  # what PIL can decode is not what DALI can
        for i in _failing_alone(source, number, build):
            file, cause = plan.index.file(read_ids[i]), _cause(failure)
            damage[read_ids[i]] = ImageError(
                f"got {file}, which PIL can decode and DALI can't: {cause}; convert it, or choose the loader "
                f"torchvision",
                f"DALI: {cause}",
            )
    if not damage:
        names = name_some(plan.index.file(sample_id) for sample_id in read_ids)
        raise DataError(
            f"DALI could not decode a batch of these files, though each of them alone: {names}; {_cause(failure)}"
        )
    if isinstance(plan, EvalPlan):
        raise next(iter(damage.values()))
    bad_files.update({sample_id: error.reason for sample_id, error in damage.items()})


def _failing_alone(source: DaliSource, number: int, build: Callable[..., Pipeline]) -> list[int]:
    """Positions in a batch of the samples that fail when they go alone through the same graph."""
    ((encoded, *arrays),) = source.batches([number])
    failing, start = [], 0
    while start < len(encoded):
        singles = range(start, len(encoded))
        pipeline = build(
            (([encoded[i]], *(array[i : i + 1] for array in arrays)) for i in singles),
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


_DECODE_OPTIONS = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}


def _inputs(source: Iterable, num_parameters: int):
    """Encoded files, height and width, and parameters; DALI reads them where they lie, see `DaliSource`."""
    return fn.external_source(source, num_outputs=2 + num_parameters, no_copy=True)


def _decode_crop(encoded, size, start, shape, decoder: dict):
    """The crop of a picture that is as large as `size` says; another one fails before a decoder sees the batch."""
    stored = fn.slice(fn.peek_image_shape(encoded, dtype=types.INT32, adjust_orientation=False), [0], [2], axes=[0])
    is_changed = fn.reshape(fn.reductions.max(fn.cast(stored != size, dtype=types.INT32)), shape=[1])
    start = start + fn.slice(types.Constant(np.zeros(1, dtype=np.int32)), start=is_changed, shape=[1], axes=[0])
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=[0, 1], **decoder)


@do_not_convert  # by enable_conditionals
def _on_cpu(function: Callable, threads: Readers, image, parameter):
    """`function(image, parameter)` of each sample, in threads; DALI itself would call it for one after another."""

    def each(images, parameters):
        return list(threads.map(function, images, parameters))

    return fn.python_function(image, parameter, function=each, batch_processing=True, output_layouts="HWC")


def _resize(image, size, interpolation: str, threads: Readers | None):
    """Antialiased, to (height, width); DALI's own costs 1.9 ms of CPU time an image more (NOTES.md)."""
    if threads is None:
        return fn.resize(image, size=size, interp_type=GPU_INTERPOLATIONS[interpolation], antialias=True)
    return _on_cpu(partial(_resize_on_cpu, interpolation), threads, image, size)


def _resize_on_cpu(interpolation: str, image: np.ndarray, size: np.ndarray) -> np.ndarray:
    height, width = size.astype(int).tolist()
    if interpolation not in ("bicubic", "bilinear"):  # PyTorch has no others with antialiasing
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()]))
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels last, and so is what comes out
    resized = F.interpolate(pixels, size=[height, width], mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].numpy()


def _saturate(image, factor, threads: Readers | None):
    """x <- f x + (1 - f) grey(x); as a matrix on a GPU, on the CPU by PIL in a sixth of that time."""
    if threads is None:
        identity, grey = types.Constant(np.eye(3, dtype=np.float32)), types.Constant(np.tile(_GREY, (3, 1)))
        return fn.coord_transform(image, M=identity * factor + grey * (1 - factor), T=_TRUNCATE, dtype=types.UINT8)
    return _on_cpu(_saturate_on_cpu, threads, image, factor)


def _saturate_on_cpu(image: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(float(factor)))


def _brighten(image, factor):
    return fn.brightness_contrast(image, brightness=factor, brightness_shift=_TRUNCATE / 255)


def _contrast(image, factor):
    """PIL's, around the mean of the grey picture."""
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    centre = fn.reductions.mean(grey).cpu()
    return fn.brightness_contrast(image, contrast=factor, contrast_center=centre, brightness_shift=_TRUNCATE / 255)


def _jitter(image, orders: Sequence, factors: Sequence, threads: Readers | None):
    for order, factor in zip(orders, factors):
        # a condition on a per-sample value splits the batch, so each sample pays for its own operation only
        if order == BRIGHTNESS:
            image = _brighten(image, factor)
        elif order == CONTRAST:
            image = _contrast(image, factor)
        else:
            image = _saturate(image, factor, threads)
    return image


@pipeline_def(enable_conditionals=True)
def _train_graph(
    source: Iterable,
    plan: TrainPlan,
    normalize: Sequence[dict],
    decoder: dict,
    threads: Readers | None,
):
    view, sizes, labels = plan.view, plan.view.sizes, ()
    num_changes = 2 * _NUM_STAGES if view.is_jittered else int(view.is_changed)
    encoded, size, start, shape, flip, *changes = _inputs(source, 3 + num_changes + view.labels)
    if view.labels:
        labels = (changes.pop(),)
    crop = _decode_crop(encoded, size, start, shape, decoder)
    image = _resize(crop, types.Constant(np.full(2, sizes[0], dtype=np.float32)), view.interpolation, threads)
    views = [fn.crop_mirror_normalize(image, mirror=flip, **normalize[0])]
    if sizes[-1] != sizes[0]:
        image = _resize(crop, types.Constant(np.full(2, sizes[-1], dtype=np.float32)), view.interpolation, threads)
    if view.is_jittered:
        image = _jitter(image, changes[:_NUM_STAGES], changes[_NUM_STAGES:], threads)
        views.append(fn.crop_mirror_normalize(image, mirror=flip, **normalize[-1]))
    elif view.is_changed:  # what shifts and turns comes after the flip
        image = _rand_augment(fn.flip(image, horizontal=flip), changes[0], plan, threads)
        views.append(fn.crop_mirror_normalize(image, **normalize[-1]))
    return (*views[-view.num_views :], *labels)


def _rand_augment(image, rows, plan: TrainPlan, threads: Readers | None):
    """timm's pictures, by PIL in threads; on a GPU DALI's operations, which differ as docs/finetuning.md lists.

    Args:
        rows: (layers, 9) of each sample, see `dali_source`.
    """
    if threads is not None:
        return _on_cpu(partial(_rand_augment_on_cpu, plan.rand_augment), threads, image, rows)
    fill = types.Constant(np.array(plan.rand_augment.fill, dtype=np.float32).reshape(1, 1, 3))
    for layer in range(plan.rand_augment.num_layers):
        kind, strength = fn.cast(rows[layer, 2], dtype=types.INT32), fn.cast(rows[layer, 1], dtype=types.FLOAT)
        on_device = strength.gpu() if image.device == "gpu" else strength
        if kind == _WARP:
            matrix = fn.reshape(fn.cast(rows[layer, 3:], dtype=types.FLOAT), shape=[2, 3])
            moved = fn.warp_affine(image - fill, matrix=matrix, fill_value=0, interp_type=types.INTERP_LINEAR)
            image = fn.cast(moved + fill, dtype=types.UINT8)
        elif kind == _AUTO_CONTRAST:
            image = augmentations.auto_contrast.op(image, None)
        elif kind == _EQUALIZE:
            image = _equalize(image)
        elif kind == _INVERT:
            image = types.Constant(255, dtype=types.UINT8) - image
        elif kind == _POSTERIZE:
            step = math.pow(2.0, 8.0 - on_device)
            image = fn.cast(math.floor(image / step) * step, dtype=types.UINT8)
        elif kind == _SOLARIZE:
            is_below = image < on_device
            image = fn.cast(is_below * image + (is_below ^ True) * (255 - image), dtype=types.UINT8)
        elif kind == _SOLARIZE_ADD:
            is_below = image < 128
            image = fn.cast(math.min(image + is_below * on_device, 255.0), dtype=types.UINT8)
        elif kind == _COLOR:
            image = _saturate(image, strength, None)
        elif kind == _DESATURATE:
            image = _saturate(image, 1.0 - strength, None)
        elif kind == _CONTRAST:
            image = _contrast(image, strength)
        elif kind == _BRIGHTNESS:
            image = _brighten(image, strength)
        elif kind == _SHARPNESS:
            blur, same = types.Constant(_SMOOTH), types.Constant(_SAME)
            image = _filter(image, blur + (same - blur) * strength)
        elif kind == _GAUSSIAN_BLUR:
            image = fn.gaussian_blur(image, sigma=strength)
    return image


def _rand_augment_on_cpu(rand_augment: RandAugment, image: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.asarray(rand_augment.apply(Image.fromarray(image), rows[:, 0], rows[:, 1]))


@pipeline_def
def _eval_graph(
    source: Iterable,
    plan: EvalPlan,
    normalize: Sequence[dict],
    decoder: dict,
    threads: Readers | None,
):
    encoded, size, start, shape, resized, anchor = _inputs(source, 4)
    image = _decode_crop(encoded, size, start, shape, decoder)
    image = _resize(image, resized, plan.view.interpolation, threads)
    image = fn.slice(image, start=anchor, shape=[plan.view.img_size, plan.view.img_size], axes=[0, 1])
    return fn.crop_mirror_normalize(image, **normalize[0])
