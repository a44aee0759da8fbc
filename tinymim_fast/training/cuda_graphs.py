"""A CUDA graph of a task's frozen model: one launch for its kernels, which read and write memory that stays.

The student is not captured: graphs of training steps have given wrong gradients under accumulation without an error
(pytorch#96693), and DeepSpeed's hooks work on each step's new tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from tinymim_fast.errors import InputError
from tinymim_fast.training.task import Frozen

logger = logging.getLogger("tinymim_fast")
WARM_UP = 3  # calls before: libraries set up their handles and work space, compilers compile


class Graphed:
    """A forward without gradients and random numbers as a CUDA graph, for images of one shape and dtype.

    A call copies its images into the graph's own, on the device: B x 3 x S x S numbers read and written, 0.04 ms for
    256 images of 224 pixels in 16 bits at 4 TB/s. It returns the graph's own results, which the next call overwrites:
    what reads them must be queued before. Images of another shape or dtype run as without a graph.

    Args:
        forward: what to capture.
        images: an example; its values don't matter.

    Raises:
        RuntimeError: something in it can't be captured.
    """

    def __init__(self, forward: Callable[[torch.Tensor], Any], images: torch.Tensor):
        self._forward = forward
        self._images = images.clone()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.no_grad():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    forward(self._images)
            torch.cuda.current_stream(images.device).wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Threads of the loader and of NCCL go on with their own calls meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = forward(self._images)

    def __call__(self, images: torch.Tensor) -> Any:
        """What `forward` gives for these images."""
        if images.shape != self._images.shape or images.dtype != self._images.dtype:
            return self._forward(images)
        self._images.copy_(images)
        self._graph.replay()
        return self._results


def capture_frozen(choice: bool | str, frozen: Frozen | None, device: torch.device, shape: tuple[int, ...]) -> None:
    """Replace the forward of a task's frozen model by its CUDA graph, where that is wanted.

    "auto" captures nothing as long as no GPU has shown the graph to be right and faster.

    Args:
        choice: the field `cuda_graphs`.
        frozen: the task's.
        device: where it is.
        shape: of the images of a micro-batch; all have it, as loaders leave out what fills none.

    Raises:
        InputError: it is asked for and can't be; argument "cuda_graphs".
    """
    if choice is not True:
        return
    if device.type != "cuda":
        raise InputError(f"got true, which needs a CUDA device, and this is {device.type}", argument="cuda_graphs")
    if frozen is None:
        raise InputError("got true, but this kind of training has no frozen model to capture", argument="cuda_graphs")
    if frozen.not_alike:
        raise InputError(f"got true, but {frozen.not_alike} anew at each call; want false", argument="cuda_graphs")
    images = torch.zeros(shape, dtype=frozen.dtype, device=device)
    try:
        frozen.module.forward = Graphed(frozen.module.forward, images)
    except RuntimeError as error:
        settings = ", ".join(f"{name} {value}" for name, value in frozen.settings.items())
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"got true, but the frozen model can't be captured with {settings}: {reason}; change one of these, or want "
            "false",
            argument="cuda_graphs",
        ) from error
    logger.info("cuda graphs: the frozen model is captured for images %s", shape)
