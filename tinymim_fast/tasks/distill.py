"""Distillation: students reproduce what a frozen teacher, which runs once a batch, shows of itself."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tinymim_fast.config import RunConfig
from tinymim_fast.errors import InputError, flags
from tinymim_fast.files import listed_checksums, sha256
from tinymim_fast.tasks.students import FLAGS, StudentConfig, read_students, targets_of

if TYPE_CHECKING:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from tinymim_fast.data import ImageIndex
    from tinymim_fast.distributed import World
    from tinymim_fast.models.model_info import ModelInfo
    from tinymim_fast.models.preprocessing import Preprocessing
    from tinymim_fast.training.task import Task, Views

logger = logging.getLogger("tinymim_fast")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig):
    """A distillation run: a frozen teacher's token relations or features, reproduced by one student or several.

    Args:
        teacher_checkpoint: an official MAE or TinyMIM `.pth`, a checkpoint or export of this package (folder or
            file), or `timm:NAME` for timm's own weights.
        student_model: timm name of a VisionTransformer.
        student_model_kwargs: passed to `timm.create_model`, e.g. `{"reg_tokens": 4}`; `num_heads` may be a list, one
            number for each block.
        student_pos_embed: "sincos", fixed as in MAE, or "learn".
        teacher_model: timm name of the teacher; read from the checkpoint where that says it.
        teacher_model_kwargs: passed to `timm.create_model`; `num_heads` may be a list, one number for each block.
        teacher_key: of several models in the teacher's file, the one below this key, e.g. "teacher".
        teacher_mean: per-channel mean of the teacher's view, of 1; default the one that it was trained with, where its
            file says it, else `mean`.
        teacher_std: per-channel standard deviation of the teacher's view; default likewise.
        teacher_precision: "fp32", "bf16", "int8" or "fp8" (linear layers alone), or "auto": bf16 wherever the device
            has it, whatever the student's.
        target_block: the teacher's block, 1-based; default 18 for 24 blocks (ViT-L), else the last.
        relation_heads: heads of the relations; must divide both widths; default the teacher's.
        relations: any of qk, vv, qq, kk.
        relation_weights: one weight a relation; default 1 each.
        drop_path: the student's, the same in every block before the last.
        targets: what to distil, the long form of `relations`: mappings such as `{kind: relations, relations: [qk, vv],
            teacher_block: 18, heads: 16, weight: 1.0}`; docs/targets.md has all of them.
        students: several students of one teacher pass: mappings such as `{name: small, model: vit_small_patch16_224,
            lr_scale: 1.0}`, see docs/targets.md; what one doesn't say, the flags say.
        tokens: which of them relations and features are of: "all", "patches", or "auto": all where teacher and student
            have the same class and register tokens, else the patches.
        mask_ratio: share of the patches that students do not see.
        teacher_drop_path: the teacher's, the same in every block before its last.
        color_jitter: strength of brightness, contrast and saturation jitter of the student's view.
        loss_backend: "auto", "triton", "chunked" or "reference".
        monitor_interval: optimizer steps between two looks at each relation head's divergence from the teacher's,
            `head_kl` in the metrics; 0: none. A look costs the relation loss once more, forward only.
    """

    FREE_ON_RESUME: ClassVar[frozenset[str]] = RunConfig.FREE_ON_RESUME | {
        "loss_backend",
        "monitor_interval",
        "teacher_checkpoint",
    }

    teacher_checkpoint: str
    student_model: str = "vit_base_patch16_224"
    student_model_kwargs: dict[str, Any] = field(default_factory=dict)
    student_pos_embed: Literal["sincos", "learn"] = "sincos"
    teacher_model: str | None = None
    teacher_model_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_key: str | None = None
    teacher_mean: tuple[float, float, float] | None = None
    teacher_std: tuple[float, float, float] | None = None
    teacher_precision: Literal["auto", "fp32", "bf16", "int8", "fp8"] = "auto"
    target_block: int | None = None
    relation_heads: int | None = None
    relations: tuple[Literal["qk", "vv", "qq", "kk"], ...] = ("qk", "vv")
    relation_weights: tuple[float, ...] | None = None
    drop_path: float = 0.1
    targets: tuple[dict[str, Any], ...] | None = None
    students: tuple[dict[str, Any], ...] | None = None
    tokens: Literal["auto", "all", "patches"] = "auto"
    mask_ratio: float = 0.0
    teacher_drop_path: float = 0.0
    color_jitter: float = 0.4
    loss_backend: Literal["auto", "triton", "chunked", "reference"] = "auto"
    monitor_interval: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("relations", 0 < len(self.relations) == len(set(self.relations)), "one or more, none twice")
        weights = self.relation_weights
        self._check(
            "relation_weights",
            weights is None or (len(weights) == len(self.relations) and min(weights) >= 0 < max(weights)),
            f"{len(self.relations)} weights, one for each of {', '.join(self.relations)}, 0 or more and not all 0",
        )
        self._check("teacher_std", self.teacher_std is None or min(self.teacher_std) > 0, "three numbers above 0")
        self._check("relation_heads", self.relation_heads is None or self.relation_heads > 0, "more than 0")
        self._check("target_block", self.target_block is None or self.target_block > 0, "1 or more")
        self._check("drop_path", 0 <= self.drop_path < 1, "a probability below 1")
        self._check("mask_ratio", 0 <= self.mask_ratio < 1, "a share below 1")
        self._check("teacher_drop_path", 0 <= self.teacher_drop_path < 1, "a probability below 1")
        self._check("monitor_interval", self.monitor_interval >= 0, "0 or more")
        self._check("color_jitter", 0 <= self.color_jitter <= 1, "0 to 1")
        for where, student in self.each_student:
            targets_of(student, where, self.mask_ratio)

    @property
    def each_student(self) -> list[tuple[str, StudentConfig]]:
        """Where the recipe says each student, "students[0]." or nothing, and what it says."""
        with flags(**FLAGS):
            of_flags = StudentConfig(
                model=self.student_model,
                model_kwargs=self.student_model_kwargs,
                pos_embed=self.student_pos_embed,
                drop_path=self.drop_path,
                target_block=self.target_block,
                relation_heads=self.relation_heads,
                relations=self.relations,
                relation_weights=self.relation_weights,
                targets=self.targets,
            )
        if self.students is None:
            return [("", of_flags)]
        students = read_students(self.students, of_flags)
        return [(f"students[{number}].", student) for number, student in enumerate(students)]


def load_teacher(
    config: DistillConfig, began: "Preprocessing | None" = None
) -> "tuple[VisionTransformer, ModelInfo, Preprocessing]":
    """The whole teacher, fp32 on the CPU, what it is, and how its view is made.

    Args:
        config: of the run.
        began: how its view was made so far, of a run that goes on.

    Raises:
        InputError: no such checkpoint, or not what the run's flags say.
    """
    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.preprocessing import Preprocessing
    from tinymim_fast.models.vit import set_constant_drop_path

    names = {"source": "checkpoint", "model": "model", "model_kwargs": "model_kwargs", "key": "key"}
    with flags(**{name: f"teacher_{field}" for name, field in names.items()}):
        vit, info = load_encoder(
            config.teacher_checkpoint,
            model=config.teacher_model,
            model_kwargs=config.teacher_model_kwargs,
            img_size=config.img_size,
            key=config.teacher_key,
        )
    if config.teacher_drop_path:
        set_constant_drop_path(vit, config.teacher_drop_path)
    logger.info("teacher: %s", info.architecture)
    view = began or Preprocessing(
        mean=config.teacher_mean or (info.expects.mean if info.expects else config.mean),
        std=config.teacher_std or (info.expects.std if info.expects else config.std),
    )
    if info.expects and info.expects.interpolation not in ("random", config.interpolation):
        logger.warning(
            "the teacher was trained on images resized by %s, here by %s: interpolation sets it",
            info.expects.interpolation,
            config.interpolation,
        )
    if info.expects:
        own = not info.expects.differences(view.mean, view.std)
        other = info.expects.differences(*((config.mean, config.std) if own else (view.mean, view.std)))
        if other:
            how = "; its view has its own, the student's this" if own else ""
            logger.warning("the teacher was trained on images of another %s%s", "; of another ".join(other), how)
    return vit, info, view


def which_teacher(config: DistillConfig) -> dict[str, Any]:
    """What tells this teacher from others, wherever its file lies: the checksum, and a name for readers.

    A run's output folder means its newest checkpoint, which another day is another teacher.

    Raises:
        InputError: no such file, or not what was saved.
    """
    from tinymim_fast.models.checkpoints import find_weights

    if config.teacher_checkpoint.startswith("timm:"):
        return {"name": config.teacher_checkpoint}
    with flags(source="teacher_checkpoint"):
        path = find_weights(Path(config.teacher_checkpoint))
    digest = sha256(path)
    try:
        saved = listed_checksums(path.parent).get(path.name, digest)
    except (OSError, ValueError):
        saved = None
    if saved != digest:
        raise InputError(
            f"{path} is not what was saved: its checksum differs; take another checkpoint",
            argument="teacher_checkpoint",
        )
    return {"name": path.parent.name if path.parent.name.startswith("step_") else path.name, "sha256": digest}


def build_task(
    config: DistillConfig, world: "World", checkpoint: Path | None, images: "ImageIndex | None" = None
) -> "Task":
    """Students with their targets, and the teacher, which runs once a batch up to the last place that any asks for.

    Args:
        config: of the run.
        world: this process; the teacher goes to its device.
        checkpoint: to take the students' weights from; None for fresh ones, from torch's random numbers.
        images: to train on; no task here depends on them.

    Raises:
        InputError: a model or checkpoint that can't be used, or models that don't fit each other.
    """
    import torch
    from timm.layers import DropPath
    from torch.profiler import record_function

    from tinymim_fast.models.attention import use_attention
    from tinymim_fast.models.checkpoints import describe
    from tinymim_fast.models.masking import gather_tokens, shuffled_patches
    from tinymim_fast.models.precision import choose_precision, lower_precision
    from tinymim_fast.models.taps import Taps
    from tinymim_fast.models.vit import whole_blocks
    from tinymim_fast.random_streams import RandomStreams
    from tinymim_fast.targets.distiller import JointDistiller, distinct
    from tinymim_fast.targets.monitor import HeadMonitor
    from tinymim_fast.tasks.build_students import build_students, info_of, one_size
    from tinymim_fast.training.task import Frozen, Task, train_view

    with flags(source="output_dir"):
        began = describe(checkpoint) if checkpoint is not None else None
    vit_t, info_t, view_t = load_teacher(config, began.teacher_expects if began else None)
    students = build_students(config, vit_t, info_t.head_layout, checkpoint)
    visible = students[0].distiller.num_visible
    for built in students:
        logger.info("student: %s", built)
    teacher = Taps(vit_t, distinct(place for built in students for place in built.distiller.places_t))
    for built in students:
        built.distiller.places_t = teacher.places
    streams = RandomStreams(
        world.device, alike=tuple(built.name for built in students if built.name), apart=("mask", "teacher")
    )
    model = students[0].distiller
    if config.students is not None:
        with flags(name="students"):
            model = JointDistiller({built.name: built.distiller for built in students}, streams)

    dtype = torch.bfloat16 if config.bf16 else torch.float32
    with flags(precision="teacher_precision"):
        precision = choose_precision(config.teacher_precision, world.device)
    dtype_t = lower_precision(teacher, precision, world.device)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.train(config.teacher_drop_path > 0)
    logger.info("teacher: %s, attention %s", precision, use_attention(teacher, config.attention, world.device, dtype_t))
    attention = use_attention(model, config.attention, world.device, dtype, gradients=True)
    logger.info("student: %s, attention %s", "bf16" if config.bf16 else "fp32", attention)
    try:  # a backend that can't run here says so now, not after the set-up
        for built in students:
            for target in built.distiller.targets.values():
                target.try_on(world.device, dtype, dtype_t)
    except ValueError as error:
        raise InputError(f"got {config.loss_backend}: {error}", argument="loss_backend") from error

    settings = {"teacher_precision": precision, "attention": config.attention, "compile": config.compile}

    def prepare(views: "Views") -> "Views":
        teacher_view, student_view = views
        with record_function("teacher"), streams.of("teacher") if config.teacher_drop_path else nullcontext():
            of_teacher = teacher(teacher_view.to(dtype_t)).values()
        if visible is None:
            return student_view, *of_teacher
        with streams.of("mask"):
            shuffle = shuffled_patches(len(student_view), vit_t.patch_embed.num_patches, student_view.device)
        seen, prefix = shuffle[:, :visible], teacher.num_prefix_tokens
        return student_view, *(gather_tokens(z, seen, prefix) if z.ndim == 3 else z for z in of_teacher), shuffle

    def weights(trained: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {name: tensor for built in students for name, tensor in built.weights(trained).items()}

    watch = {}
    if config.monitor_interval:
        with flags(interval="monitor_interval"):
            watch["watch"] = HeadMonitor(model, config.monitor_interval).around
    return Task(
        model=model,
        prepare=prepare,
        parts=model.parts,
        view=train_view(
            config,
            world,
            color_jitter=config.color_jitter,
            teacher_mean=view_t.mean,
            teacher_std=view_t.std,
            student_img_size=one_size(students),
        ),
        weights=weights,
        info=info_of(config, students, view_t),
        lr_scale={name: built.lr_scale for built in students for name in built.scaled_names()},
        streams=streams,
        **watch,
        kept={"teacher_checkpoint": which_teacher(config)},
        frozen=Frozen(teacher, dtype_t, settings, "teacher_drop_path draws" if config.teacher_drop_path else ""),
        regions=(*whole_blocks(model), *(whole_blocks(teacher) if precision != "int8" else ())),
    )
