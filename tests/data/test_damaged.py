"""Damaged and odd files: what a scan tells, what they cost in training, and that no evaluation hides them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image

from support.loaders import copies, eval_loader, train_loader
from support.programs import PACKAGE, ROOT, distill_flags
from support.runs import distil
from tinymim_fast.config import parse
from tinymim_fast.data import (
    DataError,
    ImageIndex,
    find_images,
    pack,
    scan,
    scan_images,
)
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.draws import draw_replacements
from tinymim_fast.data.views import IMAGENET_STD
from tinymim_fast.distributed import free_port
from tinymim_fast.errors import EXIT_INPUT, InputError
from tinymim_fast.models.checkpoints import latest_checkpoint
from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.training import resume
from tinymim_fast.training.metrics import read_metrics

DAMAGED = {
    "disc/empty.jpg": "empty",
    "disc/huge.jpg": "huge: more than 89,478,485 pixels",
    "disc/text.jpg": "non-image",
    "disc/truncated.jpg": "truncated: image file is truncated",
}
INSIDE = "disc/inside.bmp"


def test_scan_tells_each_kind(odd_root):
    index = scan_images(odd_root, split="train", workers=1)
    assert {name: reason.partition(" (")[0] for name, reason in index.damaged.items()} == DAMAGED
    assert {t: [n.partition(":")[0] for n in names] for t, names in scan.names_by_verdict(index).items()} == {
        "empty": ["disc/empty.jpg"],
        "huge": ["disc/huge.jpg"],
        "non-image": ["disc/text.jpg"],
        "truncated": ["disc/truncated.jpg"],
        "cmyk": ["disc/cmyk.jpg"],
        "greyscale": ["disc/deep.png", "disc/grey.jpg"],
        "sixteen-bit": ["disc/deep.png"],
        "misnamed": ["disc/png.JPEG"],
    }
    assert len(index) == 48 + 5 and index.num_listed == 48 + 9
    at = index.paths.index("disc/png.JPEG")
    assert index.num_bytes[at] == os.path.getsize(index.file(at))


def test_unreadable_files_and_what_follows_the_end(odd_root):
    folder = odd_root / "train" / "disc"
    (folder / "loop.jpg").symlink_to("loop.jpg")
    whole, png = (folder / "00000.jpg").read_bytes(), (folder / "png.JPEG").read_bytes()
    (folder / "padded.jpg").write_bytes(whole + bytes(40))
    (folder / "padded.png").write_bytes(png + bytes(40))
    (folder / "endless.png").write_bytes(png[:-12])  # whole but for its end, which PIL does not miss and DALI does
    with Image.open(folder / "00000.jpg") as image:
        image.save(folder / "gif.png", format="GIF")
        image.save(folder / "cut.tiff", compression="tiff_lzw")
    os.truncate(folder / "cut.tiff", 5000)
    damaged = scan_images(odd_root / "train").damaged
    assert damaged["disc/gif.png"] == "unsupported: GIF"
    assert damaged["disc/cut.tiff"].startswith(("truncated", "non-image"))
    assert damaged["disc/loop.jpg"].startswith("unreadable: ")
    assert damaged["disc/endless.png"] == "truncated: image file is truncated"
    assert not {"disc/padded.jpg", "disc/padded.png"} & damaged.keys()


def test_loaders_agree_on_odd_files(odd_root):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("torchvision")
    index = find_images(odd_root, workers=1)
    both, bad = [], []
    for loader_name in ("dali", "torchvision"):
        with train_loader(index, loader_name, batch_size=53) as loader:
            both.append(copies(loader.batches(0, 1))[0])
            bad.append(loader.bad_files.reasons)
    assert bad[0] == bad[1] and [index.paths[i] for i in bad[0]] == [INSIDE]
    difference = (both[0] - both[1]).abs().mean(dim=(2, 3, 4)) * 255 * np.mean(IMAGENET_STD)  # (views, images)
    assert difference.mean() < 0.4 and difference.max() < 1.2, difference


@pytest.fixture
def damageable_index(drawn_root, tmp_path):
    shutil.copytree(drawn_root / "train", tmp_path / "train")
    return scan_images(tmp_path / "train", workers=1)


@pytest.mark.fault(
    "an image is damaged, missing or replaced by one of another size",
    "another image takes its place, the same for any ranks, loader and start; named once",
    tries=6,
)
@pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
def test_a_damaged_file_costs_its_sample_alone(damageable_index, loader_name, device, damage):
    index, options = damageable_index, {"device": device, "scale": (1, 1), "ratio": (1, 1)}
    with train_loader(index, loader_name, **options) as loader:
        sound = copies(loader.batches(0, 12))
        victim = int(loader.plan.sample_ids(3)[5])
    file = index.file(victim)
    if damage == "truncated":
        os.truncate(file, os.path.getsize(file) // 2)
    elif damage == "missing":
        os.remove(file)
    else:
        Image.new("RGB", (40, 40)).save(file)
    with train_loader(index, loader_name, **options) as loader:
        found = []
        for views in loader.batches(0, 12):
            found.append((torch.stack(views).cpu(), dict(loader.bad_files.reasons)))
        reason = {
            "truncated": "truncated",
            "missing": "No such file",
            "changed": "40 x 40 pixels, not the indexed 96 x 96",
        }
        assert loader.bad_files.reasons.keys() == {victim} and reason[damage] in loader.bad_files.reasons[victim]
        positions = [(n, i) for n in range(12) for i in np.flatnonzero(loader.plan.sample_ids(n) == victim)]
        assert positions[0] == (3, 5) and len(positions) == 2, "once an epoch"
        for epoch, (number, i) in enumerate(positions):
            other = draw_replacements(victim, len(index), 1, seed=1, epoch=epoch)[0]
            assert loader.plan.read_ids(number, loader.bad_files)[i] == other != victim
    for number, (views, bad) in enumerate(found):
        assert bad.keys() <= {victim}
        changed = [i for i in range(8) if not torch.equal(views[:, i], sound[number][:, i])]
        assert changed == [i for n, i in positions if n == number]
    # A loader that knows, a later start and two ranks have the same.
    parts = []
    for rank in range(2):
        with train_loader(index, loader_name, batch_size=4, rank=rank, world_size=2, **options) as loader:
            if rank == 0:
                loader.bad_files.reasons[victim] = "known"
            parts.append(copies(loader.batches(3, 2)))
    for number in (3, 4):
        assert torch.equal(torch.cat([part[number - 3] for part in parts], dim=1), found[number][0])


def test_a_file_that_dali_alone_cant_decode_is_replaced_too(damageable_index, monkeypatch):
    pytest.importorskip("nvidia.dali")
    victim = 7
    os.truncate(damageable_index.file(victim), 800)
    monkeypatch.setattr(ImageIndex, "read_image", lambda index, sample_id: None)  # as if PIL could
    with train_loader(damageable_index, "dali", batch_size=48) as loader:
        next(loader.batches(0, 1))
        assert loader.bad_files.reasons.keys() == {victim} and loader.bad_files.reasons[victim].startswith("DALI: ")


@pytest.mark.parametrize("fmt", ["GIF", "TGA", None])
def test_what_is_no_image_any_more_fails_without_a_crash(damageable_index, device, fmt):
    """DALI 2.4's decoders end the process with such bytes among others, not each time."""
    pytest.importorskip("nvidia.dali")
    file = Path(damageable_index.file(7))
    with Image.open(file) as image:
        image.load()
    if fmt:
        image.save(file, format=fmt)
    else:
        file.write_text("no picture, " * 9)
    for _ in range(5):
        with train_loader(damageable_index, "dali", batch_size=48, device=device) as loader:
            next(loader.batches(0, 1))
            assert loader.bad_files.reasons.keys() == {7}
    for _ in range(5):
        with (
            eval_loader(damageable_index, "dali", batch_size=48, device=device) as loader,
            pytest.raises(DataError),
        ):
            list(loader)


def test_a_bad_replacement_is_replaced_too(damageable_index, loader_name):
    with train_loader(damageable_index, loader_name) as loader:
        victim = int(loader.plan.sample_ids(0)[2])
        draws = draw_replacements(victim, len(damageable_index), 3, seed=1, epoch=0)
        for sample_id in {victim, *draws[:2]} - {draws[2]}:
            os.remove(damageable_index.file(sample_id))
        next(loader.batches(0, 1))
        assert loader.plan.read_ids(0, loader.bad_files)[2] == draws[2] and loader.bad_files.reasons.keys() >= {
            victim,
            *draws[:2],
        }


@pytest.mark.fault("the data folder goes away", "one line")
def test_an_unmounted_folder_ends_the_run(damageable_index, loader_name):
    shutil.rmtree(damageable_index.root)
    with (
        train_loader(damageable_index, loader_name) as loader,
        pytest.raises(
            DataError, match=r"^got .*\.jpg, which can't be decoded \(No such file.* are they still there\?$"
        ),
    ):
        next(loader.batches(0, 1))


def test_evaluation_names_a_damaged_file(damageable_index, loader_name, device):
    victim = damageable_index.file(11)
    os.truncate(victim, os.path.getsize(victim) // 2)
    with eval_loader(damageable_index, loader_name, device=device) as loader, pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"got {victim}") and "Traceback" not in str(caught.value)
    rescanned = scan_images(damageable_index.root, workers=1)
    with pytest.raises(DataError, match=rf"1 images can't be decoded: {damageable_index.paths[11]};"):
        eval_loader(rescanned, loader_name, device=device)


def test_a_continued_run_keeps_its_list(damageable_index, tmp_path):
    root, output_dir = damageable_index.root, tmp_path / "run"
    config = parse(DistillConfig, distill_flags(root, "none", output_dir, max_bad_files=0.05), "train.py")
    output_dir.mkdir()
    damageable_index.save(output_dir / resume.INDEX)
    file = damageable_index.file(7)
    content = Path(file).read_bytes()
    os.truncate(file, 500)
    now = resume.find_run_images(config, resumed=True)
    assert now.paths == damageable_index.paths and now.damaged == {}, "found when it is read"
    assert len(resume.find_run_images(config, resumed=False)) == 47
    bad_files = BadFiles(now)
    bad_files.recheck(now.paths[6:9])
    assert bad_files.reasons.keys() == {7}
    Path(file).write_bytes(content)
    bad_files = BadFiles(now)
    bad_files.recheck(now.paths[6:9])
    assert bad_files.reasons == {}, "repaired"
    assert pack.main([str(root), str(tmp_path / "packed"), "--workers=1"]) == 0
    shards = resume.find_run_images(dataclasses.replace(config, data_path=str(tmp_path / "packed")), resumed=True)
    assert shards.paths == now.paths and shards.shards
    os.remove(file)
    with pytest.raises(InputError, match="holds 47 images, not the 48 that this run began with"):
        resume.find_run_images(config, resumed=True)


@pytest.mark.fault(
    "shards are packed anew between stop and start", "each image is found by its name; or refused", tries=2
)
def test_a_continued_run_finds_its_images_in_shards_packed_anew(damageable_index, tmp_path):
    """Shards of the same names, with other images in other places; then with one damaged, and one that is gone."""
    root, packed, output_dir = damageable_index.root, tmp_path / "packed", tmp_path / "run"
    config = parse(DistillConfig, distill_flags(packed, "none", output_dir, max_bad_files=0.05), "train.py")
    assert pack.main([str(root), str(packed), "--workers=1", "--max-count=20"]) == 0
    began = resume.find_run_images(config, resumed=False)
    pictures = [np.asarray(began.read_image(i)) for i in range(48)]
    output_dir.mkdir()
    began.save(output_dir / resume.INDEX)
    shutil.rmtree(packed)
    assert pack.main([str(root), str(packed), "--workers=1", "--max-count=30"]) == 0
    (packed / "index.npz").unlink()  # as shards of another program have none
    now = resume.find_run_images(config, resumed=True)
    assert now.paths == began.paths and not np.array_equal(now.spans, began.spans)
    assert all(np.array_equal(np.asarray(now.read_image(i)), pictures[i]) for i in range(48))
    shard, offset = now.spans[7].tolist()
    with open(packed / now.shards[shard], "r+b") as file:
        file.seek(offset)
        file.write(bytes(int(now.num_bytes[7])))
    now = resume.find_run_images(config, resumed=True)
    assert now.paths == began.paths
    bad_files = BadFiles(now)
    bad_files.recheck(now.paths)
    assert bad_files.reasons.keys() == {7}
    assert all(np.array_equal(np.asarray(now.read_image(i)), pictures[i]) for i in range(48) if i != 7)
    os.remove(damageable_index.file(7))
    shutil.rmtree(packed)
    assert pack.main([str(root), str(packed), "--workers=1"]) == 0
    with pytest.raises(InputError, match="holds 47 images, not the 48 that this run began with"):
        resume.find_run_images(config, resumed=True)


def run_two_ranks(*flags):
    """Exit codes and outputs of two training processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port())}
    command, options = [sys.executable, PACKAGE / "train.py", *flags], {"cwd": ROOT, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [subprocess.Popen(command, env={**env, "RANK": r, "LOCAL_RANK": r}, **options) for r in "01"]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [process.returncode for process in ranks], outputs


def test_a_run_replaces_and_names_damaged_files_until_they_are_too_many(world, odd_root, teacher_file, tmp_path):
    """Two ranks: stopped by the share, continued with a larger one and the other loader."""
    pytest.importorskip("nvidia.dali")

    def flags(**changes):
        options = {"epochs": 2, "train_batch_size": 8, "zero_stage": 0, "tensorboard": "true"}
        return distill_flags(odd_root, teacher_file, tmp_path / "run", **options, **changes)

    def named():
        bad = [pair for record in read_metrics(tmp_path / "run") for pair in record.get("bad_files", {}).items()]
        return [(name, reason.partition(" (")[0]) for name, reason in bad]

    with pytest.raises(
        InputError, match=r"--max-bad-files: got 0\.001, and 4 of 57 images in .*disc/empty\.jpg \(empty\)"
    ):
        distil(world, *flags())
    assert not (tmp_path / "run").exists()

    codes, outputs = run_two_ranks(*flags(max_bad_files=0.08, loader="dali"))  # 4.56 files
    assert codes == [EXIT_INPUT, EXIT_INPUT], outputs
    said = f"--max-bad-files: got 0.08, and 5 of 57 images in {odd_root / 'train'} can't be decoded (0.088 of all): "
    (line,) = [line for output in outputs for line in output.splitlines() if said in line]  # on one rank, once
    assert line.startswith("train.py: ") and f"{INSIDE} (image file is truncated" in line
    assert not any("Traceback" in output for output in outputs)
    before = named()
    with safetensors.safe_open(latest_checkpoint(tmp_path / "run") / "optimizer.safetensors", framework="pt") as file:
        assert dict(before).keys() == json.loads(file.metadata()["client_state"])["bad_files"].keys()
    assert sorted(before) == sorted([*DAMAGED.items(), (INSIDE, "image file is truncated")])

    codes, outputs = run_two_ranks(*flags(max_bad_files=0.1, loader="torchvision"))
    assert codes == [0, 0] and "continuing from" in outputs[0], outputs
    assert read_metrics(tmp_path / "run")[-1]["step"] == 2 * (53 // 8) and named() == before, "once"
    assert [r["num_bad_files"] for r in read_metrics(tmp_path / "run") if "num_bad_files" in r][-1] == 5
