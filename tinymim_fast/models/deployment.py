"""A model for where there is no timm: PyTorch's exported program, and ONNX; both take any number of images."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.export import Dim, ExportedProgram

from tinymim_fast.errors import InputError

PROGRAM, ONNX = "model.pt2", "model.onnx"
INPUT, OUTPUT = "images", "outputs"
MAX_BATCH = 1 << 16
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CHECKED = (1, 3)  # numbers of images that a written file is tried with
MAX_ERROR = 1e-4  # of the largest output; fp32 in another order of sums


def check_packages() -> None:
    """Refuse ONNX before any work where its packages are missing.

    Raises:
        InputError: argument "formats".
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"onnx needs {', '.join(missing)}: pip install 'tinymim_fast[export]'",
            argument="formats",
        )


def export_program(vit: VisionTransformer, img_size: int) -> ExportedProgram:
    """`torch.export` of the model in evaluation mode: images (B, 3, S, S), B any number, to what timm's model gives.

    Args:
        vit: on the CPU, fp32.
        img_size: side of the images, pixels.
    """
    images = torch.zeros(2, 3, img_size, img_size)
    return torch.export.export(vit.eval(), (images,), dynamic_shapes=({0: Dim("batch", min=1, max=MAX_BATCH)},))


def save_program(program: ExportedProgram, path: Path, said: Mapping[str, object]) -> None:
    """Write `torch.export.save`'s file; `torch.export.load(path, extra_files=...)` gives `said` as JSON.

    Args:
        program: of `export_program`.
        path: to write.
        said: of the model and its images.
    """
    torch.export.save(program, path, extra_files={"tinymim_fast.json": json.dumps(said)})


def save_onnx(program: ExportedProgram, path: Path, said: Mapping[str, object]) -> None:
    """Write an ONNX file with one input, "images", and one output; `said` is in its metadata, values as JSON.

    Args:
        program: of `export_program`.
        path: to write; weights above 2 GiB lie beside it.
        said: of the model and its images.
    """
    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    converted.model.metadata_props.update({name: json.dumps(value) for name, value in said.items()})
    converted.save(path)


@torch.inference_mode()
def check_file(path: Path, vit: VisionTransformer, img_size: int) -> float:
    """Largest error of a written file, over the largest output, on random images, one and several at once.

    ONNX is run by onnxruntime on the CPU, a program by PyTorch.

    Args:
        path: of `save_program` or `save_onnx`.
        vit: what it was made of, on the CPU.
        img_size: side of the images, pixels.

    Raises:
        InputError: above `MAX_ERROR`; argument "formats".
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    run = onnx_runner(path) if path.suffix == ".onnx" else torch.export.load(path).module()
    for batch_size in CHECKED:
        images = torch.randn(batch_size, 3, img_size, img_size, generator=generator)
        want = vit.eval()(images)
        worst = max(worst, ((run(images) - want).abs().max() / want.abs().max()).item())
    if not worst <= MAX_ERROR:
        raise InputError(
            f"{path.name} would differ from the model by {worst:.1g} of its largest output, more than {MAX_ERROR:g}; "
            "take other formats, and tell us of the model",
            argument="formats",
        )
    return worst


def onnx_runner(path: Path, num_threads: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives a written ONNX file's output of CPU images, by onnxruntime on the CPU.

    Args:
        path: of `save_onnx`.
        num_threads: of an operator; 0: onnxruntime's choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
