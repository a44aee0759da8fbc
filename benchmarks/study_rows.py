"""What the study compares: the models, how each student is pre-trained, and the paper's numbers beside ours.

Everything is a flag of the project's own programs; nothing was tuned, on the validation images least of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tinymim_fast.tasks.distill import DistillConfig

NAME = "vit_tiny_patch16_224"  # timm's; sizes are its arguments


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The models, and how many images a step takes.

    Args:
        img_size: pixels.
        teacher, student, assistant: arguments of timm's model; the assistant stands between the two in the chain.
        target_block: of the teacher, 1-based, three quarters of its depth, as 18 of 24 in the paper.
        decoder: of the masked autoencoders.
        batch_size: images a step, of every stage.
    """

    img_size: int = 32
    teacher: Mapping[str, Any] = field(
        default_factory=lambda: {"patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4}
    )
    student: Mapping[str, Any] = field(
        default_factory=lambda: {"patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4}
    )
    assistant: Mapping[str, Any] = field(
        default_factory=lambda: {"patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 4}
    )
    target_block: int = 6
    decoder: Mapping[str, int] = field(
        default_factory=lambda: {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}
    )
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One student: how it was made before fine-tuning.

    Args:
        name: of its folders and in the CSV.
        title: in the table.
        group: "methods", which are compared with each other, or "relations", each compared with that row.
        program: "train.py", "pretrain.py", or "" where nothing goes before fine-tuning.
        flags: of that program, beside those that all share.
        student: which of `Sizes` it trains.
        teacher: whose checkpoint it learns from: "teacher", or another row.
        longer: fine-tuning takes the epochs of pre-training too.
        compared: it is fine-tuned and evaluated; else it is a teacher only.
        paper: what the paper has for the same comparison.
    """

    name: str
    title: str
    group: str = "methods"
    program: str = "train.py"
    flags: Mapping[str, Any] = field(default_factory=dict)
    student: str = "student"
    teacher: str = "teacher"
    longer: bool = False
    compared: bool = True
    paper: str = ""

    @property
    def missing(self) -> list[str]:
        """Flags that this version's train.py does not have, for which the row is left out."""
        known = {f.name for f in fields(DistillConfig)}
        return [name for name in self.flags if self.program == "train.py" and name not in known]


def rows(sizes: Sizes) -> tuple[Row, ...]:
    """All rows, the most important first; a row's teacher stands before it."""
    block, depth = {"target_block": sizes.target_block}, sizes.teacher["depth"]
    without_softmax = {"kind": "relations", "softmax": False, "teacher_block": sizes.target_block}
    return (
        Row(name="scratch", title="from scratch", program="", paper="T 72.2, S 79.9, B 81.2"),
        Row(name="relations", title="relations QK + VV", flags=block, paper="T 75.8, S 83.0, B 85.0"),
        Row(
            name="features",
            title="features of the last block",
            flags={"targets": [{"kind": "features"}]},
            paper="T 73.4, S 80.8, B 83.8",
        ),
        Row(
            name="class_token",
            title="class token",
            flags={"targets": [{"kind": "class_token"}]},
            paper="T 70.6, S 79.6, B 82.6",
        ),
        Row(name="mae", title="MAE itself", program="pretrain.py", paper="T 71.6, S 80.6, B 83.6"),
        Row(
            name="scratch_longer",
            title="from scratch, as many steps as both stages of the others",
            program="",
            longer=True,
        ),
        Row(
            name="last_block",
            title=f"block {depth} of {depth} instead of {sizes.target_block}",
            group="relations",
            flags={"target_block": depth},
            paper="B, 24 against 18 of 24: 84.4 against 84.6 (21: 84.8)",
        ),
        Row(
            name="masked",
            title="masked input",
            group="relations",
            flags={**block, "mask_ratio": 0.75},
            paper="B: 83.9 against 84.6",
        ),
        Row(
            name="no_softmax",
            title="without softmax",
            group="relations",
            flags={"targets": [without_softmax]},
            paper="B: 84.4 against 84.6",
        ),
        Row(
            name="drop_path_0",
            title="drop path 0 instead of 0.1",
            group="relations",
            flags={**block, "drop_path": 0.0},
            paper="B: 84.3 against 84.6",
        ),
        Row(
            name="drop_path_2",
            title="drop path 0.2 instead of 0.1",
            group="relations",
            flags={**block, "drop_path": 0.2},
            paper="B: 84.3 against 84.6",
        ),
        Row(
            name="assistant",
            title="the student between, of the next row",
            group="relations",
            flags=block,
            student="assistant",
            compared=False,
        ),
        Row(
            name="sequential",
            title="by way of a student between",
            group="relations",
            teacher="assistant",
            paper="T: 75.0 against 74.4",
        ),
    )


def shared_flags(sizes: Sizes) -> dict[str, Any]:
    """Flags of every program."""
    return {
        "img_size": sizes.img_size,
        "train_batch_size": sizes.batch_size,
        "scale": [0.4, 1.0],
        "workers": 2,
        "log_interval": 20,
        "checkpoint_minutes": 2,
        "checkpoint_hist": 1,
        "tensorboard": False,
    }


def pretrain_flags(sizes: Sizes, which: str) -> dict[str, Any]:
    """Flags of pretrain.py, of the teacher and of the row "mae"."""
    models = {"model": NAME, "model_kwargs": dict(getattr(sizes, which))}
    return {**shared_flags(sizes), **models, **sizes.decoder, "lr": 1.5e-3, "warmup_epochs": 0.3}


def distil_flags(sizes: Sizes, row: Row) -> dict[str, Any]:
    """Flags of train.py."""
    model = {"student_model": NAME, "student_model_kwargs": dict(getattr(sizes, row.student))}
    return {**shared_flags(sizes), **model, "lr": 1.5e-3, "warmup_epochs": 0.3, **row.flags}


def finetune_flags(sizes: Sizes, row: Row) -> dict[str, Any]:
    """Flags of finetune.py, the same for all rows."""
    fresh = {} if row.program else {"model": NAME, "model_kwargs": dict(sizes.student)}
    recipe = {"lr": 1.0e-3, "layer_decay": 0.85, "warmup_epochs": 0.3, "smoothing": 0.1, "val_interval": 0}
    return {**shared_flags(sizes), **fresh, **recipe}


def chosen(sizes: Sizes, names: list[str] | None) -> Iterator[Row]:
    """Rows of these names, or all, with the teachers that they need; those that can't run here are left out."""
    all_rows = rows(sizes)
    wanted = set(names or [row.name for row in all_rows])
    wanted |= {row.teacher for row in all_rows if row.name in wanted}
    yield from (row for row in all_rows if row.name in wanted and not row.missing)
