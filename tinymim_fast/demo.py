"""The whole story in a few minutes on a CPU: draw images, pre-train a teacher, distil a student, compare them.

python -m tinymim_fast.demo --output-dir DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tinymim_fast.data import draw_image_folder
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.evaluate import evaluate_knn
from tinymim_fast.export import export

HERE = Path(__file__).parent


def launch(program: str, recipe: str, *flags: str) -> None:
    """`deepspeed tinymim_fast/PROGRAM --config RECIPE ...`, on one device."""
    deepspeed = Path(sys.executable).parent / "deepspeed"
    launcher = [str(deepspeed), "--num_accelerators=1", f"--master_port={free_port()}"]
    command = [*launcher, str(HERE / program), "--config", recipe, *flags]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinymim_fast.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("demo-out"))
    out = parser.parse_args(argv).output_dir.resolve()
    began = time.monotonic()
    images, teacher, student, exported = (out / name for name in ("images", "teacher", "student", "export"))
    try:
        if not images.exists():
            print(f"drawing images into {images}", flush=True)
            draw_image_folder(images, num_train_per_class=200, num_val_per_class=50, size=96, seed=0)
        launch("pretrain.py", "demo_teacher", f"--data-path={images}", f"--output-dir={teacher}")
        launch(
            "train.py",
            "demo_student",
            f"--data-path={images}",
            f"--teacher-checkpoint={teacher}",
            f"--output-dir={student}",
        )
        if not exported.exists():
            export(str(student), exported)
        rows = [
            ("teacher (masked autoencoder)", evaluate_knn(str(teacher), str(images))),
            ("student, distilled", evaluate_knn(str(exported), str(images))),
            ("the same student, untrained", evaluate_knn(str(exported), str(images), untrained=True)),
        ]
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_INPUT
    except subprocess.CalledProcessError as error:
        return error.returncode
    num_classes = len(list((images / "val").iterdir()))
    print(f"\n{'k-NN accuracy on ' + str(num_classes) + ' classes':32s}  top-1 %")
    for name, accuracy in [*rows, ("chance", 1 / num_classes)]:
        print(f"{name:32s}  {100 * accuracy:6.1f}")
    print(f"\n{time.monotonic() - began:.0f} s. Checkpoints, metrics.jsonl, curves.png: {teacher} and {student}")
    print(f"For timm: timm.create_model('local-dir:{exported}', pretrained=True)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
