"""A picture of what patches relate to, in a teacher and in its students.

python -m tinymim_fast.show RUN_OR_CHECKPOINT... IMAGE... --output FILE.png [--heads 1,5] [--query ROW,COL]

The teacher is the one of the first run's recipe, or --teacher. Rows, columns, heads and blocks are counted from 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymim_fast.checkpoint_flags import checkpoint_arguments, json_object
from tinymim_fast.errors import EXIT_INPUT, InputError, flags

if TYPE_CHECKING:
    from PIL.Image import Image

    from tinymim_fast.models.model_info import ModelInfo
    from tinymim_fast.relation_maps import Viewed

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
TITLE = "What the framed patch relates to. Numbers: KL from the teacher, nats, mean over the image"


def show(
    output: Path,
    students: Sequence[str],
    images: Sequence[Path],
    *,
    teacher: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    relations: Sequence[str] | None = None,
    heads: int | None = None,
    target_block: int | None = None,
    single_heads: Sequence[int] | None = (),
    queries: Sequence[tuple[int, int]] = (),
    num_queries: int = 3,
) -> None:
    """Draw `output`: for each image and query patch its relation rows, teacher's and students'.

    Args:
        output: a PNG; appears whole or not at all.
        students: runs, checkpoints or exports; of a run with several students, all.
        images: files.
        teacher: arguments of `load_encoder`, `source` among them; default what the first student's recipe says.
        student: arguments of `load_encoder` for files that don't say what they are.
        relations: pairs of q, k and v; default the first student's.
        heads: of the relations; default the first student's.
        target_block: the teacher's, 1-based; default the first student's.
        single_heads: to draw beside the mean over heads, 1-based; None: all.
        queries: (row, column) of patches, 1-based; default the `num_queries` whose relations differ most.
        num_queries: see `queries`.

    Raises:
        InputError: a checkpoint, an image, or an argument that can't be used; nothing is written.
    """
    from tinymim_fast.relation_maps import check_viewed, compare, telling_queries
    from tinymim_fast.relation_picture import draw, lines_of

    if output.suffix.lower() != ".png":
        raise InputError(f"got {output}, want a name that ends in .png", argument="output")
    pictures = [open_image(path) for path in images]
    viewed, infos = load_students(students, student or {})
    first = infos[0]
    of_teacher = load_teacher(teacher or teacher_of(first), first, target_block)
    heads = (
        heads or first.head_layout.get("relation_heads") or of_teacher.vit.blocks[of_teacher.block - 1].attn.num_heads
    )
    relations = list(dict.fromkeys(relations or relations_of(first)))
    if single_heads is None:
        single_heads = range(1, heads + 1)
    if bad := [head for head in single_heads if not 1 <= head <= heads]:
        raise InputError(f"got {bad[0]}, want 1 to {heads}", argument="single_heads")
    check_viewed(of_teacher, viewed, heads)
    rows, columns = of_teacher.grid
    for query in queries:
        if not (1 <= query[0] <= rows and 1 <= query[1] <= columns):
            raise InputError(f"got {query[0]},{query[1]}, want 1,1 to {rows},{columns}", argument="queries")

    lines = []
    for picture in pictures:
        compared = compare(picture, of_teacher, viewed, relations, heads)
        asked = [(row - 1) * columns + column - 1 for row, column in queries]
        means = compared.rows[relations[-1]][of_teacher.title].mean(0)
        found = asked or telling_queries(means, min(num_queries, len(means)))
        lines += lines_of(compared, found, [head - 1 for head in single_heads])
    try:
        draw(output, lines, of_teacher.grid, title=TITLE)
    except OSError as error:
        raise InputError(f"{output}: can't be written: {error}", argument="output") from error


def open_image(path: Path) -> Image:
    """An image file as RGB.

    Raises:
        InputError: it can't be read; argument "images".
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: can't be read: {error}", argument="images") from error


def load_students(sources: Sequence[str], given: Mapping[str, Any]) -> tuple[list[Viewed], list[ModelInfo]]:
    """The students, each tapped at its last block and with a title of its own, and what they are.

    Raises:
        InputError: see `load_encoder`.
    """
    from tinymim_fast.models.checkpoints import load_encoder

    found: dict[str, tuple[Viewed, ModelInfo]] = {}
    for source in sources:
        for key in names_in(source, given):
            vit, info = load_encoder(source, **{**given, "key": key})
            title = title_of(source) if key in (None, given.get("key")) else key
            while title in found or title == "teacher":
                title += "\u2032"
            found[title] = viewed(title, vit, info, len(vit.blocks)), info
    students, infos = zip(*found.values(), strict=True)
    return list(students), list(infos)


def names_in(source: str, given: Mapping[str, Any]) -> list[str | None]:
    """Keys of the students that a file holds: of a run of several their names, else the one that was given."""
    from tinymim_fast.models.checkpoints import describe

    if given.get("key") is None and not source.startswith("timm:"):
        info = describe(Path(source))
        if info is not None and info.students:
            return list(info.students)
    return [given.get("key")]


def title_of(source: str) -> str:
    """A short name: the run's folder, the export's, the file's."""
    path = Path(source.removeprefix("timm:"))
    parts = [part for part in path.parts if part not in ("checkpoints", "model.safetensors", "/")]
    if len(parts) > 1 and parts[-1].startswith("step_"):
        parts.pop()
    return parts[-1] if parts else source


def teacher_of(info: ModelInfo) -> dict[str, Any]:
    """Arguments of `load_encoder` for the teacher that a student's recipe names.

    Raises:
        InputError: it names none; argument "teacher".
    """
    recipe = info.recipe
    if "teacher_checkpoint" not in recipe:
        raise InputError("got none, and the first checkpoint doesn't say it; want the teacher's", argument="teacher")
    return {
        "source": recipe["teacher_checkpoint"],
        "model": recipe.get("teacher_model"),
        "model_kwargs": recipe.get("teacher_model_kwargs"),
        "key": recipe.get("teacher_key"),
        "img_size": recipe.get("img_size"),
    }


def load_teacher(given: Mapping[str, Any], student: ModelInfo, target_block: int | None) -> Viewed:
    """The teacher, tapped at the block that the student learnt from, with the images that it was shown.

    Raises:
        InputError: see `load_encoder`, its arguments with "teacher_" before; or no such block.
    """
    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.vit import default_target_block

    names = {name: f"teacher_{name}" for name in ("model", "model_kwargs", "key")}
    with flags(source="teacher", **names):
        vit, info = load_encoder(**given)
    block = target_block or student.head_layout.get("teacher_block") or default_target_block(len(vit.blocks))
    if block > len(vit.blocks):
        raise InputError(f"got {block}, want 1 to {len(vit.blocks)}, the teacher's blocks", argument="target_block")
    return viewed("teacher", vit, info, block, student.teacher_expects)


def relations_of(info: ModelInfo) -> Sequence[str]:
    """The relations that a student learnt, as far as its recipe says."""
    for target in info.recipe.get("targets") or ():
        if target.get("kind") == "relations" and isinstance(target.get("relations"), list):
            return target["relations"]
    return info.recipe.get("relations") or ("qk", "vv")


def viewed(title: str, vit: Any, info: ModelInfo, block: int, expects: Any = None) -> Viewed:
    """A loaded model with the images that it expects, ImageNet's where nothing says it."""
    from tinymim_fast.models.preprocessing import Preprocessing
    from tinymim_fast.relation_maps import Viewed

    return Viewed(title=title, vit=vit, block=block, expects=expects or info.expects or Preprocessing())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tinymim_fast.show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="RUN_OR_CHECKPOINT... IMAGE...", help="images are told by their names' endings")
    add("--output", type=Path, required=True, metavar="FILE.png")
    add("--heads", default="", metavar="N,N|all", help="heads to draw beside their mean; each one's KL is drawn anyway")
    add("--query", action="append", default=[], metavar="ROW,COL", help="patch, may be repeated; default: telling ones")
    add("--num-queries", type=int, default=3, help="how many telling patches of each image")
    add("--relations", nargs="+", metavar="XY", help="default: the first student's")
    add("--relation-heads", type=int, help="default: the first student's")
    add("--target-block", type=int, help="of the teacher; default: the first student's")
    add("--teacher", metavar="CHECKPOINT", help="default: what the first student's recipe says")
    for who in ("teacher-", ""):
        add(f"--{who}model", help="timm name, where the file can't tell")
        add(f"--{who}model-kwargs", default="{}", metavar="JSON", help="for that model")
        add(f"--{who}key", help="of several models in one file, the one below this key")
    args = parser.parse_args(argv)
    logging.basicConfig(format="show: %(message)s", level=logging.WARNING)
    names = {"single_heads": "--heads", "queries": "--query", "heads": "--relation-heads", "images": "IMAGE"}
    names |= {n: f"--{n.replace('_', '-')}" for n in ("output", "relations", "target_block", "num_queries", "teacher")}
    names |= {n: f"--{n.replace('_', '-')}" for n in ("teacher_model", "teacher_model_kwargs", "teacher_key")}
    names |= {"source": "CHECKPOINT", "model": "--model", "model_kwargs": "--model-kwargs", "key": "--key"}
    try:
        with flags(**names):
            show(args.output, **arguments(args))
    except InputError as error:
        print(f"show: {error}", file=sys.stderr)
        return EXIT_INPUT
    print(args.output)
    return 0


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as `show`'s arguments.

    Raises:
        InputError: text that can't be one of them.
    """
    images = [Path(source) for source in args.sources if source.lower().endswith(IMAGE_ENDINGS)]
    students = [source for source in args.sources if not source.lower().endswith(IMAGE_ENDINGS)]
    for given, what, argument in ((students, "a run or checkpoint", "source"), (images, "an image", "images")):
        if not given:
            raise InputError(f"got none, want {what}", argument=argument)
    if args.num_queries < 1:
        raise InputError(f"got {args.num_queries}, want 1 or more", argument="num_queries")
    for relation in args.relations or ():
        if len(relation) != 2 or not set(relation) <= set("qkv"):
            raise InputError(f"got {relation}, want two of the letters q, k and v", argument="relations")
    teacher = None
    if args.teacher is not None:
        kwargs = json_object(args.teacher_model_kwargs, "teacher_model_kwargs")
        teacher = {"source": args.teacher, "model": args.teacher_model, "model_kwargs": kwargs, "key": args.teacher_key}
    return {
        "students": students,
        "images": images,
        "teacher": teacher,
        "student": checkpoint_arguments(args),
        "relations": args.relations,
        "heads": args.relation_heads,
        "target_block": args.target_block,
        "single_heads": None if args.heads == "all" else _numbers(args.heads, "single_heads"),
        "queries": [_pair(query) for query in args.query],
        "num_queries": args.num_queries,
    }


def _numbers(text: str, argument: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise InputError(f"got {text}, want numbers with commas between them", argument=argument) from None


def _pair(text: str) -> tuple[int, int]:
    numbers = _numbers(text, "queries")
    if len(numbers) != 2:
        raise InputError(f"got {text}, want a row and a column, 3,5", argument="queries")
    return numbers[0], numbers[1]


if __name__ == "__main__":
    sys.exit(main())
