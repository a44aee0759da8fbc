"""The whole story in a few minutes on a CPU: draw images, pre-train a teacher, distil a student, make it a classifier.

python -m tinymim_fast.demo --output-dir DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.stages import Stages, launch, tell_failure

NUM_STAGES = 7
PICTURED, NUM_QUERIES = "val/star/00005.jpg", 4  # whose relations are drawn, and of how many of its patches


def tell_story(stages: Stages, out: Path, log: Path) -> None:
    """All stages, each from where an earlier call of this program left it, and what came of them.

    Raises:
        InputError: the folder can't be used, or holds something else.
        subprocess.CalledProcessError: a training program failed.
    """
    from tinymim_fast.data import draw_image_folder
    from tinymim_fast.evaluate import evaluate_knn
    from tinymim_fast.export import export
    from tinymim_fast.training.metrics import read_metrics

    images, teacher, student, exported = (out / name for name in ("images", "teacher", "student", "export"))
    stages.begin("drawing images of 16 classes")
    if not images.exists():
        draw_image_folder(images, num_train_per_class=200, num_val_per_class=50, size=96, seed=0)
    stages.end(f"{len(list(images.glob('train/*/*')))} to train on, {len(list(images.glob('val/*/*')))} to test with")

    stages.begin("pre-training the teacher, a masked autoencoder")
    paths = (f"--data-path={images}", f"--output-dir={teacher}")
    launch(stages, log, _one_device(), "pretrain.py", "--config=demo_teacher", *paths)

    stages.begin("distilling the student, half as wide, from the teacher's relations")
    paths = (f"--data-path={images}", f"--teacher-checkpoint={teacher}", f"--output-dir={student}")
    launch(stages, log, _one_device(), "train.py", "--config=demo_student", *paths)

    stages.begin("comparing their features by k nearest neighbours")
    if not exported.exists():
        export(str(student), exported)
    num_classes = len(list(images.glob("val/*")))
    accuracies = {
        "teacher (masked autoencoder)": evaluate_knn(str(teacher), str(images)),
        "student, distilled": evaluate_knn(str(exported), str(images)),
        "the same student, untrained": evaluate_knn(str(exported), str(images), untrained=True),
        "chance": 1 / num_classes,
    }
    stages.end()

    stages.begin("drawing what the student learnt")
    picture = out / "relations.png"
    picture_relations(picture, images / PICTURED, str(teacher), str(exported))
    stages.end()

    classifiers = {"student, distilled": str(student), "the same model from scratch": "none"}
    fine_tuned = {}
    for name, checkpoint in classifiers.items():
        run = out / ("classifier" if checkpoint != "none" else "classifier_from_scratch")
        stages.begin(f"fine-tuning to {num_classes} classes: {name}")
        paths = (f"--data-path={images}", f"--checkpoint={checkpoint}", f"--output-dir={run}")
        launch(stages, log, _one_device(), "finetune.py", "--config=demo_finetune", *paths)
        fine_tuned[name] = next(r["top1"] for r in reversed(read_metrics(run)) if "top1" in r) / 100

    for title, found in (("k-NN", accuracies), ("fine-tuned", fine_tuned)):
        print(f"\n{f'{title} accuracy on {num_classes} classes':40s}  top-1 %")
        for name, accuracy in found.items():
            print(f"{name:40s}  {100 * accuracy:7.1f}")
    print("\nPictures")
    print(f"  relations of teacher and student, before and after  {picture}")
    for name, run in (("teacher", teacher), ("student", student), ("classifier", out / "classifier")):
        print(f"  loss, learning rate, images/s: {name:20s} {run / 'curves.png'}")
    print(f"\nIn timm: timm.create_model('local-dir:{exported}', pretrained=True)")


def _one_device() -> tuple[str, str]:
    from tinymim_fast.distributed import free_port

    return "--num_accelerators=1", f"--master_port={free_port()}"


def picture_relations(path: Path, image_file: Path, teacher: str, student: str) -> None:
    """What patches of one image relate to in the teacher, in the untrained and in the distilled student, as a PNG."""
    import torch

    from tinymim_fast.models.checkpoints import load_encoder
    from tinymim_fast.models.vit import create_vit, init_mae_style
    from tinymim_fast.relation_maps import compare, telling_queries
    from tinymim_fast.relation_picture import draw, lines_of
    from tinymim_fast.show import TITLE, load_teacher, open_image, viewed

    distilled, info = load_encoder(student)
    torch.manual_seed(info.recipe["seed"])  # the weights that training began with
    untrained = create_vit(info.architecture, **info.model_kwargs)
    init_mae_style(untrained, pos_embed=info.recipe["student_pos_embed"])
    of_teacher = load_teacher({"source": teacher}, info, None)
    vits = {"student before": untrained, "student after": distilled}
    students = [viewed(title, vit, info, len(vit.blocks)) for title, vit in vits.items()]
    relations, heads = info.recipe["relations"], info.head_layout["relation_heads"]
    compared = compare(open_image(image_file), of_teacher, students, relations, heads)
    queries = telling_queries(compared.rows[relations[-1]]["teacher"].mean(0), NUM_QUERIES)
    draw(path, lines_of(compared, queries), of_teacher.grid, title=TITLE)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, that of the program that failed where one did."""
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("demo-out"), help="folder; started again, it goes on")
    out = parser.parse_args(argv).output_dir.resolve()
    log, began = out / "demo.log", time.monotonic()
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            log.touch()
        except OSError as error:
            raise InputError(f"{out}: can't be written: {error}", argument="--output-dir") from error
        print(f"Everything goes to {out}, what the programs say to {log}\n", flush=True)
        tell_story(Stages(NUM_STAGES), out, log)
    except InputError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return EXIT_INPUT
    except subprocess.CalledProcessError as error:
        return tell_failure("demo", "the program", error, log)
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
