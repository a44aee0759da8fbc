"""The fallback loader: PIL and torchvision in worker processes, applying the parameters of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tinymim_fast.data.errors import DataError
from tinymim_fast.data.plan import EvalPlan, TrainPlan

_JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)  # indexed by BRIGHTNESS, CONTRAST, SATURATION
_BICUBIC = F.InterpolationMode.BICUBIC


class _TrainBatches(Dataset):
    """Micro-batch number -> `views` uint8 tensors (B, 3, S, S), on the CPU."""

    def __init__(self, plan: TrainPlan):
        self.plan = plan

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        plan, params, samples = self.plan, self.plan.params(number), []
        for i, sample_id in enumerate(plan.sample_ids(number)):
            box = (int(params.top[i]), int(params.left[i]), int(params.height[i]), int(params.width[i]))
            image = plan.index.read_image(sample_id)
            image = F.resized_crop(image, *box, [plan.img_size, plan.img_size], interpolation=_BICUBIC)
            if params.flip[i]:
                image = F.hflip(image)
            views = [image]
            if plan.views == 2:
                for operation in params.jitter_order[i]:
                    image = _JITTER[operation](image, float(params.jitter[i, operation]))
                views.append(image)
            samples.append([F.pil_to_tensor(view) for view in views])
        return tuple(torch.stack(view) for view in zip(*samples))


class _EvalBatches(Dataset):
    """Batch number -> one uint8 tensor (B, 3, S, S), on the CPU."""

    def __init__(self, plan: EvalPlan):
        self.plan = plan

    def __getitem__(self, number: int) -> tuple[torch.Tensor]:
        plan, params, images = self.plan, self.plan.params(number), []
        for i, sample_id in enumerate(plan.sample_ids(number)):
            image: Image.Image = plan.index.read_image(sample_id)
            image = F.resize(image, [int(params.height[i]), int(params.width[i])], interpolation=_BICUBIC)
            image = F.crop(image, int(params.top[i]), int(params.left[i]), plan.img_size, plan.img_size)
            images.append(F.pil_to_tensor(image))
        return (torch.stack(images),)


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
    """Float32 views (B, 3, S, S) on `device` for each batch number; `workers` processes, 0 for none.

    Raises:
        DataError: a file can't be decoded; names it.
    """
    dataset = _TrainBatches(plan) if isinstance(plan, TrainPlan) else _EvalBatches(plan)
    loader = iter(
        DataLoader(
            dataset,
            batch_size=None,  # one item is one batch
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            prefetch_factor=prefetch if min(workers, len(numbers)) else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global generator, which resuming must not
        )
    )
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=device).view(3, 1, 1)
    try:
        for views in loader:  # uint8, a quarter of the bytes for workers to send
            yield tuple(torch.addcmul(shift, view.to(device, non_blocking=True), scale) for view in views)
    except DataError as error:  # a worker's comes with its traceback in front
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    finally:
        if hasattr(loader, "_shutdown_workers"):  # now, not when the last traceback that holds it is dropped
            loader._shutdown_workers()
