"""What every run has in common: typed, frozen, checked configuration, read from YAML recipes and the command line.

Every field is a flag (`--train-batch-size 1024`) and a YAML key (`train_batch_size: 1024`); the command line wins.
Names follow timm and DeepSpeed, so a flag that exists there means the same here. What one kind of training adds is in
tasks/. Nothing here waits for torch. Annotations of configurations are not postponed: jsonargparse would import what
their modules import for type checkers.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import yaml

from tinymim_fast.batches import BatchPlan
from tinymim_fast.errors import InputError, flags
from tinymim_fast.yaml_files import read_mapping

RECIPES = Path(__file__).parent / "recipes"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What distillation and masked-autoencoder pre-training have in common.

    Args:
        data_path: image folder, `DIR/<class>/*.jpg`, or a folder that holds it as `DIR/train`; tar shards,
            `DIR/train-*.tar`; or an index that `python -m tinymim_fast.data.scan` wrote.
        split: which of the folders or shards in `data_path`: "train", or a folder's name.
        layout: what `data_path` holds where its listing says two things: "splits", "classes" or "shards".
        max_image_pixels: larger images count as damaged.
        max_bad_files: largest share of the images that may be damaged; they are replaced, more stop the run.
        output_dir: checkpoints, metrics and the resolved configuration go here.
        img_size: side of the square input, pixels.
        scale: range of the crop's share of the image area.
        ratio: range of the crop's aspect ratio (width / height).
        hflip: probability of a horizontal flip.
        mean: per-channel mean of the input, of 1.
        std: per-channel standard deviation of the input, of 1.
        interpolation: of the resizing to `img_size`: "bicubic", "bilinear", "lanczos", "box", "hamming" or "nearest".
        loader: "dali", "torchvision", or "auto": DALI where it is installed.
        workers: decoding threads (DALI) or processes (torchvision) per rank.
        dali_kwargs: DALI's settings, any of `{"hw_decoder_load": 0.9, "device_memory_padding": 211025920,
            "host_memory_padding": 140544512, "prefetch_queue_depth": 3}`; memory in bytes.
        epochs: passes over the data.
        train_batch_size: images per optimizer step, over all ranks.
        train_micro_batch_size_per_gpu: images per forward pass on one rank; worked out if not given.
        gradient_accumulation_steps: forward passes per optimizer step; worked out if not given.
        lr: peak learning rate; overrides `lr_base`.
        lr_base: peak learning rate per `lr_base_size` images of global batch (linear rule).
        lr_base_size: see `lr_base`.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: linear warm-up.
        warmup_lr: learning rate that it begins with.
        weight_decay: AdamW's, on weights of two and more dimensions only.
        opt_betas: AdamW's.
        clip_grad: largest gradient norm; 0 does not clip.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3.
        bf16: bf16 weights with fp32 master weights and fp32 gradient accumulation; else fp32.
        compile: compile the models' blocks; "auto": on GPUs.
        cuda_graphs: run a distillation's teacher as a CUDA graph, on a GPU alone; "auto": not yet, as nothing has shown
            it to be faster.
        attention: "sdpa", "flash", "cudnn" or "efficient" of PyTorch, "xformers", "math" (plain products), or "auto":
            the fastest by the table in models/attention.py, sdpa where it has no row.
        profile: optimizer steps to trace, after the first five of a start; 0 traces none.
        deepspeed_config: a DeepSpeed JSON file, merged into what these fields say; a contradiction is an error.
        seed: of the initial weights, the order of the data, the crops, drop path.
        log_interval: optimizer steps between two lines of metrics.
        checkpoint_interval: optimizer steps between checkpoints; 0: by time only.
        checkpoint_minutes: minutes between checkpoints; 0: by steps only. The last step is always saved.
        checkpoint_hist: checkpoints kept.
        on_nonfinite: "stop" ends the run where a loss or weight is NaN or infinite; "skip" looks at each step's
            gradient, which waits for the device, and leaves such a step out.
        max_nonfinite: steps that "skip" may leave out in a whole run; one more ends it.
        verify_checkpoints: compare a checkpoint with its checksums before going on from it; reads it twice, and takes
            0.6 s of a core for each GB (AMD EPYC, SHA-256 in hardware).
        max_time: minutes from the program's start after which the run saves and stops with code 75; 0: none.
        max_wait: minutes that one micro-batch may be waited for, after which the run saves and ends with code 75; 0:
            any time.
        resume: "auto" continues what `output_dir` holds; "none" starts anew and refuses a folder with checkpoints.
        tensorboard: write event files to `output_dir/tensorboard`.
    """

    # Fields that may change between a run and its continuation: none changes what is learnt.
    FREE_ON_RESUME: ClassVar[frozenset[str]] = frozenset(
        [
            "data_path",
            "split",
            "layout",
            "max_bad_files",
            "output_dir",
            "loader",
            "workers",
            "dali_kwargs",
            "log_interval",
            "checkpoint_interval",
            "checkpoint_minutes",
            "checkpoint_hist",
            "on_nonfinite",
            "max_nonfinite",
            "verify_checkpoints",
            "max_time",
            "max_wait",
            "resume",
            "tensorboard",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "zero_stage",
            "compile",
            "cuda_graphs",
            "attention",
            "profile",
            "deepspeed_config",
        ]
    )

    data_path: str
    output_dir: str
    img_size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["bicubic", "bilinear", "lanczos", "box", "hamming", "nearest"] = "bicubic"
    split: str = "train"
    layout: Literal["auto", "splits", "classes", "shards"] = "auto"
    max_image_pixels: int = 89_478_485
    max_bad_files: float = 0.001
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    workers: int = 8
    dali_kwargs: dict[str, Any] = field(default_factory=dict)
    epochs: int = 300
    train_batch_size: int = 4096
    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int | None = None
    lr: float | None = None
    lr_base: float = 1.5e-4
    lr_base_size: int = 256
    min_lr: float = 0.0
    warmup_epochs: float = 15.0
    warmup_lr: float = 0.0
    weight_decay: float = 0.05
    opt_betas: tuple[float, float] = (0.9, 0.95)
    clip_grad: float = 0.0
    zero_stage: Literal[0, 1, 2, 3] = 1
    bf16: bool = True
    compile: bool | Literal["auto"] = "auto"
    cuda_graphs: bool | Literal["auto"] = "auto"
    attention: Literal["auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math"] = "auto"
    profile: int = 0
    deepspeed_config: str | None = None
    seed: int = 0
    log_interval: int = 50
    checkpoint_interval: int = 0
    checkpoint_minutes: float = 30.0
    checkpoint_hist: int = 2
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 10
    verify_checkpoints: bool = True
    max_time: float = 0.0
    max_wait: float = 30.0
    resume: Literal["auto", "none"] = "auto"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            optional = type(None) in get_args(f.type)
            self._check(f.name, value is not None or optional, "a value")
            self._check(f.name, not isinstance(value, bool) or bool in (f.type, *get_args(f.type)), "a number")
            self._check(f.name, value != "", "no empty text")
            numbers = value if isinstance(value, tuple) else (value,)
            self._check(f.name, all(abs(v) < 2**31 for v in numbers if isinstance(v, int)), "less than 2 ** 31")
            self._check(f.name, all(math.isfinite(v) for v in numbers if isinstance(v, float)), "a finite number")
        positive = (
            "img_size workers epochs train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps lr "
            "lr_base lr_base_size log_interval checkpoint_hist max_image_pixels"
        )
        for name in positive.split():
            value = getattr(self, name)
            self._check(name, value is None or value > 0, "more than 0")
        for name in [
            "min_lr",
            "warmup_epochs",
            "warmup_lr",
            "weight_decay",
            "clip_grad",
            "checkpoint_interval",
            "checkpoint_minutes",
            "profile",
            "max_nonfinite",
            "max_time",
            "max_wait",
            "seed",
        ]:
            self._check(name, getattr(self, name) >= 0, "0 or more")
        low, high = self.scale
        self._check("scale", 0 < low <= high <= 1, "two shares of the area, 0 < low <= high <= 1")
        low, high = self.ratio
        self._check("ratio", 0 < low <= high, "two aspect ratios, 0 < low <= high")
        self._check("max_bad_files", 0 <= self.max_bad_files <= 1, "a share of the images")
        self._check("hflip", 0 <= self.hflip <= 1, "a probability")
        for name in ("mean", "teacher_mean"):
            values = getattr(self, name, None)
            of_1 = values is None or all(0 <= v <= 1 for v in values)
            self._check(name, of_1, "three numbers from 0 to 1, those of 255 divided by 255")
        for name in ("std", "teacher_std"):
            values = getattr(self, name, None)
            of_1 = values is None or all(0 < v <= 1 for v in values)
            self._check(name, of_1, "three numbers above 0, at most 1, those of 255 divided by 255")
        self._check("opt_betas", all(0 <= b < 1 for b in self.opt_betas), "two numbers in [0, 1)")
        self._check("warmup_epochs", self.warmup_epochs <= self.epochs, f"at most epochs, {self.epochs}")

    def _check(self, name: str, ok: bool, want: str) -> None:
        if not ok:
            raise InputError(f"got {getattr(self, name)}, want {want}", argument=name)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else self.lr_base * self.train_batch_size / self.lr_base_size

    def batch_plan(self, world_size: int) -> BatchPlan:
        """How `train_batch_size` is divided among ranks and micro-batches.

        Raises:
            InputError: it can't be.
        """
        total, micro, accum = (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )
        if micro is None:
            accum = accum or 1
            micro, rest = divmod(total, accum * world_size)
        elif accum is None:
            accum, rest = divmod(total, micro * world_size)
        else:
            rest = total - micro * accum * world_size
        if rest or micro < 1 or accum < 1:
            raise InputError(
                f"got {total}, want a multiple of train_micro_batch_size_per_gpu "
                f"({self.train_micro_batch_size_per_gpu or 'free'}) x gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps or 'free'}) x ranks ({world_size})",
                argument="train_batch_size",
            )
        return BatchPlan(micro_batch_size=micro, accumulation_steps=accum, world_size=world_size)


Config = TypeVar("Config", bound=RunConfig)


def parse(kind: type[Config], argv: Sequence[str], prog: str) -> Config:
    """Configuration from `--config FILE` and flags, the flags winning.

    `FILE` is a path or the name of a packaged recipe; of several the later ones win. A recipe whose first line is
    `config: OTHER.yaml` says what differs from that file beside it. Flags may be spelled with dashes or underscores.

    Raises:
        InputError: an unknown key or flag, a missing one, a wrong type or an impossible value; the message names it.
        SystemExit: after `--help`.
    """
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, description=kind.__doc__.split("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML recipe: a path, or a packaged recipe's name")
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_args(_normalise(argv, [f.name for f in fields(kind)]))
        with name_flags(kind):
            return kind(**{f.name: _plain(values[f.name]) for f in fields(kind)})
    except (ArgumentError, TypeError) as error:
        raise InputError(re.sub(r"\s+", " ", str(error)).strip()) from error


def name_flags(kind: type[RunConfig]) -> AbstractContextManager[None]:
    """Errors inside the with block name the flags of `kind`, `--img-size`, instead of its fields, `img_size`."""
    return flags(**{f.name: f"--{f.name.replace('_', '-')}" for f in fields(kind)})


def _normalise(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Dashes to underscores in flag names, recipe names to paths, launcher's flags out; recipes are read for errors."""
    args = [re.sub(r"^--[^=]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    args = [a for a in args if not a.startswith("--local_rank")]  # DeepSpeed's launcher adds it; the environment has it
    for i, arg in enumerate(args):
        flag, _, value = arg.partition("=")
        if flag != "--config":
            continue
        at = i if value else i + 1
        name = value or (args[at] if at < len(args) else "")
        with flags(path="--config", name="--config"):
            if name and not Path(name).is_file():
                name = find_recipe(name, RECIPES)
                args[at] = f"--config={name}" if value else str(name)
            if name:
                check_recipe(Path(name), names)
    return args


def check_recipe(path: Path, names: Sequence[str], including: tuple[Path, ...] = ()) -> None:
    """Refuse a recipe that can't be one, and the recipes that it begins with.

    Args:
        path: of a YAML file.
        names: known keys.
        including: files that begin with it.

    Raises:
        InputError: unreadable, an unknown key, or a `config` that is no file, not the first key, or leads back;
            argument "path".
    """
    keys = read_mapping(path)
    check_keys(keys, ["config", *names], path)
    if "config" not in keys:
        return
    if next(iter(keys)) != "config":
        raise InputError(
            f"{path}: config stands behind other keys, which it would override; make it the first line",
            argument="path",
        )
    base = path.parent / str(keys["config"])
    if base.resolve() in (path.resolve(), *including):
        raise InputError(f"{path}: config is {keys['config']}, which leads back to this file", argument="path")
    if not base.is_file():
        raise InputError(
            f"{path}: config is {keys['config']}, want a YAML file, its path seen from this one; a packaged "
            f"recipe goes before it on the command line: --config tinymim_base --config {path}",
            argument="path",
        )
    check_recipe(base, names, (*including, path.resolve()))


def find_recipe(name: str, folder: Path) -> Path:
    """The file that `name` names: itself, or a packaged recipe of `folder`.

    Raises:
        InputError: neither; argument "name".
    """
    packaged = folder / f"{name}.yaml"
    found = next((path for path in (Path(name), packaged) if path.is_file()), None)
    if found is None:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise InputError(f"got {name}, want a YAML file or one of the recipes {known}", argument="name")
    return found


def check_keys(keys: Iterable[str], names: Sequence[str], of: object) -> None:
    """Refuse keys that are none of `names`.

    Args:
        keys: given.
        names: known.
        of: what has the keys, for the message.

    Raises:
        InputError: names the first that is unknown and the one that is likely meant; argument "path".
    """
    for key in keys:
        if key not in names:
            likely = get_close_matches(key.replace("-", "_"), names, n=1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            raise InputError(f"{of} has the key {key}, which no run knows{hint}", argument="path")


def _plain(value: Any) -> Any:
    """jsonargparse's Namespace and lists to dict and tuple; "~/x" to the home folder's, as a shell does on its line."""
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return tuple(value) if isinstance(value, list) else value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain types only: what YAML and JSON can hold."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: RunConfig) -> str:
    """Every field, defaults included, in the order of the class."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differences(saved: dict[str, Any], config: RunConfig) -> list[str]:
    """Fields that make `config` another run than the saved one, each as `name: saved -> now`.

    A field that the saved one doesn't have, because it was written before there was one, had the default.
    """
    now = to_dict(config)
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    saved = json.loads(json.dumps(defaults)) | saved
    names = [n for n in [*now, *(set(saved) - set(now))] if n not in config.FREE_ON_RESUME]
    return [f"{n}: {saved.get(n)} -> {now.get(n)}" for n in names if saved.get(n) != now.get(n)]
