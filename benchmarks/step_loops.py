"""The distillation loops that train_step.py compares, each of a recipe, from the same weights.

"official_loop" is as the paper's: autocast over fp32 weights, attention with its N x N maps, the whole teacher,
materialised relations, the loss read by the host in each step. "plain" is what a user of PyTorch alone would write with
this package's teacher and loss. "ours" is what `train.py` runs: its task, its DeepSpeed engine, its step, with their
defaults; "ours, NAME VALUE" the same with one setting changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from providers import official
from step_roofs import PAIRS, RELATIONS
from tinymim_fast import engine as engines
from tinymim_fast.config import parse
from tinymim_fast.deepspeed_config import deepspeed_config
from tinymim_fast.distributed import World
from tinymim_fast.models.checkpoints import load_encoder
from tinymim_fast.models.vit import create_vit, init_mae_style
from tinymim_fast.tasks.distill import DistillConfig, build_task
from tinymim_fast.training.compilation import Compiler, wanted
from tinymim_fast.training.cuda_graphs import capture_frozen
from tinymim_fast.training.step import TrainStep
from tinymim_fast.training.task import Task

Views = tuple[Tensor, ...]
RECIPES = {"L-B": "tinymim_base", "B-S": "tinymim_small", "S-T": "tinymim_tiny", "B-T": "tinymim_tiny"}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
LR = 1e-4


@dataclass(frozen=True)
class Loop:
    """One provider's step, whole and in its parts.

    Args:
        step: takes an iterator of views, (teacher's, student's), and updates the weights once.
        prepare: from the views to the inputs of `forward`; without gradients.
        forward: the loss.
        backward: its gradient.
        update: the optimizer's step.
        gradient: between backward and update, the patch embedding's.
        loss: of both packed projections, alone.
        student: what is trained.
        teacher_precision: what it was decided to be.
    """

    step: Callable[[Iterator[Views]], object]
    prepare: Callable[[Views], Views]
    forward: Callable[..., Tensor]
    backward: Callable[[Tensor], object]
    update: Callable[[], object]
    gradient: Callable[[], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    student: nn.Module
    teacher_precision: str


def save_teacher(name: str, img_size: int, folder: Path) -> Path:
    """An untrained teacher, in the layout of MAE's releases."""
    path = folder / f"{name}_{img_size}.pth"
    if not path.exists():
        torch.manual_seed(1)
        vit = create_vit(name, img_size=img_size)
        init_mae_style(vit, pos_embed="sincos")
        torch.save({"model": vit.state_dict()}, path)
    return path


def config_of(
    pair: str, folder: Path, *, batch_size: int, precision: str, img_size: int, **settings: object
) -> DistillConfig:
    """The recipe's configuration for one pair, with an untrained teacher that is written to `folder`.

    Args:
        settings: other fields of the configuration.
    """
    of = PAIRS[pair]
    flags = {
        "config": RECIPES[pair],
        "teacher_checkpoint": save_teacher(of.teacher.name, img_size, folder),
        "teacher_model": of.teacher.name,
        "target_block": of.teacher.block,
        "relation_heads": of.relation_heads,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size,
        "bf16": str(precision == "bf16").lower(),
        "img_size": img_size,
        "data_path": "none",
        "output_dir": "none",
        **settings,
    }
    return parse(DistillConfig, [f"--{name}={value}" for name, value in flags.items()], "train_step.py")


def as_trained(config: DistillConfig, world: World, opened: ExitStack) -> tuple[Task, engines.Engine, TrainStep]:
    """What `train.py` runs: task, engine and step, compiled where a run is; the compiler is closed with `opened`."""
    torch.manual_seed(config.seed)
    task = build_task(config, world, None)
    batches = config.batch_plan(1)
    settings = {name: getattr(config, name) for name in ("zero_stage", "bf16", "clip_grad")}
    optimizer = {name: getattr(config, name) for name in ("weight_decay", "opt_betas", "seed")}
    ds_config = deepspeed_config(batches, **settings)
    regions = task.regions if wanted(config.compile, world.device) else ()
    opened.enter_context(Compiler()).compile(regions)
    shape = batches.micro_batch_size, 3, config.img_size, config.img_size
    capture_frozen(config.cuda_graphs, task.frozen, world.device, shape)
    engine = engines.Engine(task.model, ds_config, world, lr_at=lambda step: LR, regions=regions, **optimizer)
    return (
        task,
        engine,
        TrainStep(engine, task.prepare, parts=task.parts, accumulation_steps=batches.accumulation_steps),
    )


def ours(config: DistillConfig, world: World, opened: ExitStack) -> Loop:
    """`as_trained`, of one student."""
    task, engine, step = as_trained(config, world, opened)
    return Loop(
        step=step,
        prepare=lambda views: task.prepare(tuple(view.to(engine.dtype) for view in views)),
        forward=lambda *inputs: engine.forward(*inputs)["loss"],
        backward=engine.backward,
        update=engine.step,
        gradient=lambda: safe_get_full_grad(task.model.student.model.patch_embed.proj.weight),
        loss=lambda qkv_s, qkv_t: task.model.targets["relations"]((qkv_s,), (qkv_t,))["loss"],
        student=task.model.student,
        teacher_precision=task.frozen.settings["teacher_precision"],
    )


def with_setting(name: str, value: Any) -> Callable[[DistillConfig, World, ExitStack], Loop]:
    """`ours` with another value of one field of the configuration."""
    return lambda config, world, opened: ours(replace(config, **{name: value}), world, opened)


def plain(config: DistillConfig, world: World, opened: ExitStack) -> Loop:
    """A loop in PyTorch alone, fp32 weights under autocast, with our teacher and loss."""
    torch.manual_seed(config.seed)
    task, dtype = build_task(config, world, None), PRECISIONS["bf16" if config.bf16 else "fp32"]
    loop = under_autocast(
        config,
        world,
        task.model.student.to(world.device),
        prepare=lambda views: task.prepare(tuple(view.to(dtype) for view in views)),
        loss=lambda qkv_s, qkv_t: task.model.targets["relations"]((qkv_s,), (qkv_t,))["loss"],
        teacher_precision=task.frozen.settings["teacher_precision"],
    )
    return replace(loop, step=partial(whole_step, loop))


def as_the_paper(config: DistillConfig, world: World, opened: ExitStack) -> Loop:
    """The published recipe: unfused attention, the whole teacher, materialised relations, a wait in each step."""
    torch.manual_seed(config.seed)
    student = build_task(replace(config, attention="math"), world, None).model.student.to(world.device)
    teacher, _ = load_encoder(config.teacher_checkpoint, model=config.teacher_model, img_size=config.img_size)
    teacher.to(world.device).eval().requires_grad_(False)
    for module in teacher.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn, module.kernel = False, "math"
    tapped: list[Tensor] = []
    teacher.blocks[config.target_block - 1].attn.qkv.register_forward_hook(lambda *args: tapped.append(args[-1]))

    def prepare(views: Views) -> Views:
        teacher.forward_features(views[0])
        return views[1], tapped.pop()

    def step(views: Iterator[Views]) -> None:
        whole_step(loop, views).item()
        synchronize(world.device)

    def loss(qkv_s: Tensor, qkv_t: Tensor) -> Tensor:
        return official(qkv_s, qkv_t, config.relation_heads, RELATIONS)

    precision = "bf16" if config.bf16 else "fp32"
    loop = under_autocast(config, world, student, prepare=prepare, loss=loss, teacher_precision=precision)
    return replace(loop, step=step)


def under_autocast(
    config: DistillConfig,
    world: World,
    student: nn.Module,
    *,
    prepare: Callable,
    loss: Callable,
    teacher_precision: str,
) -> Loop:
    """A loop without `step`, whose models and loss run under autocast."""
    autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=config.bf16)
    groups = engines.parameter_groups(student.parameters(), config.weight_decay)
    adamw = torch.optim.AdamW(groups, lr=LR, betas=config.opt_betas, fused=True)

    def forward(images: Tensor, qkv_t: Tensor) -> Tensor:
        (qkv_s,) = student(images).values()
        return loss(qkv_s, qkv_t)

    def update() -> None:
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return Loop(
        step=None,
        prepare=autocast(prepare),
        forward=autocast(forward),
        backward=Tensor.backward,
        update=update,
        gradient=lambda: student.model.patch_embed.proj.weight.grad,
        loss=autocast(loss),
        student=student,
        teacher_precision=teacher_precision,
    )


def whole_step(loop: Loop, views: Iterator[Views]) -> Tensor:
    """The parts one after another."""
    with torch.no_grad():
        inputs = loop.prepare(next(views))
    loss = loop.forward(*inputs)
    loop.backward(loss)
    loop.update()
    return loss.detach()


# One setting at a time; who can't run on a device is a row that says why.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "compile": (True, False),
    "attention": ("sdpa", "math", "flash", "cudnn", "efficient", "xformers"),
    "teacher_precision": ("fp32", "bf16", "int8", "fp8"),
    "cuda_graphs": (True,),
}
PROVIDERS = {"official_loop": as_the_paper, "plain": plain, "ours": ours}
VARIANTS = {f"ours, {name} {value}".lower(): with_setting(name, value) for name, of in SETTINGS.items() for value in of}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
