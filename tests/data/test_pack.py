"""scan and pack from the command line, and training from what they write."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from support.loaders import copies, eval_loader, train_loader
from tinymim_fast.data import DataError, find_images, scan_images
from tinymim_fast.data import scan as scan_module
from tinymim_fast.data.pack import main as pack
from tinymim_fast.data.pack import verify
from tinymim_fast.data.scan import main as scan
from tinymim_fast.errors import EXIT_INPUT


@pytest.fixture
def root(drawn_root, tmp_path):
    """The drawn folder, two names with dots and signs whose order changes where dots are written as %2E."""
    shutil.copytree(drawn_root, tmp_path / "images")
    folder = tmp_path / "images" / "train" / "disc"
    (folder / "00000.jpg").rename(folder / "a.50%.b.jpg")
    (folder / "00001.jpg").rename(folder / "a+b.jpg")
    return tmp_path / "images"


@pytest.fixture
def packed(root, tmp_path):
    assert pack([str(root), str(tmp_path / "packed"), "--max-count=20", "--workers=1"]) == 0
    return tmp_path / "packed"


def no_scan(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("scanned")

    monkeypatch.setattr(scan_module, "scan_images", refuse)


def same_index(a, b):
    return a.paths == b.paths and a.class_names == b.class_names and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("labels", "sizes", "num_bytes", "verdicts")
    )  # fmt: skip


def test_training_takes_the_index_of_a_folder(root, tmp_path, monkeypatch, caplog):
    scanned = {split: scan_images(root, split=split, workers=1) for split in ("train", "val")}
    assert scan([str(root), "--workers=1"]) == 0
    assert scan([str(root / "train"), "--workers=1", "--output", str(tmp_path / "elsewhere.npz")]) == 0
    no_scan(monkeypatch)
    for split, index in scanned.items():
        found = find_images(root, split=split)
        assert same_index(found, index) and found.root == index.root
    assert same_index(find_images(tmp_path / "elsewhere.npz"), scanned["train"])
    os.rename(root, tmp_path / "moved")
    assert find_images(tmp_path / "moved").root == tmp_path / "moved" / "train"
    assert "changed since the scan" not in caplog.text
    with pytest.raises(DataError, match=r"elsewhere\.npz, which lists images of .*/images/train, which is no folder"):
        find_images(tmp_path / "elsewhere.npz")


def test_folders_that_changed_since_the_scan_are_named(root, caplog):
    scan([str(root), "--workers=1"])
    shutil.copy(root / "train" / "disc" / "00002.jpg", root / "train" / "disc" / "new.jpg")
    find_images(root)
    assert "changed since the scan, so new files are missed: disc;" in caplog.text


def test_scan_says_what_it_found(odd_root, tmp_path, capsys):
    assert scan([str(odd_root), "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert "train: 57 images in 16 classes, 4 left out; " in out and " s per 100,000 files" in out
    assert "  huge: 1\n    disc/huge.jpg: more than" in out and f"written: {odd_root / 'index.npz'}" in out
    assert scan([str(odd_root / "nowhere")]) == EXIT_INPUT
    assert "scan: got" in capsys.readouterr().err
    assert scan([str(odd_root), "--workers=1", "--output", str(tmp_path / "none" / "x.npz")]) == EXIT_INPUT
    assert "--output" in capsys.readouterr().err


def test_processes_find_the_same(drawn_root, drawn_index, monkeypatch):
    monkeypatch.setattr(scan_module, "_FILES_PER_TASK", 7)
    assert same_index(scan_images(drawn_root, split="train", workers=2), drawn_index)


def test_a_pack_gives_the_folders_batches(root, packed, loader_name, device):
    folder, shards = find_images(root, workers=1), find_images(packed)
    assert same_index(folder, shards) and len(shards.shards) == 3
    for i in (0, 17):
        assert np.array_equal(folder.encoded(i), shards.encoded(i))
    for rank in range(2):
        ours = []
        for index in (folder, shards):
            with train_loader(index, loader_name, batch_size=4, rank=rank, world_size=2, device=device) as loader:
                ours.append(copies(loader.batches(0, 7)))
        assert len(ours[0]) == 7 and all(torch.equal(a, b) for a, b in zip(*ours))
    folder, shards = find_images(root, split="val", workers=1), find_images(packed, split="val")
    with eval_loader(folder, loader_name) as a, eval_loader(shards, loader_name) as b:
        for (x, y, i), (u, v, j) in zip(a, b, strict=True):
            assert torch.equal(x, u) and torch.equal(y, v) and torch.equal(i, j)


def test_shards_are_webdatasets(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    keys = []
    for name, entry in manifest["shards"].items():
        with tarfile.open(packed / name) as tar:
            members = tar.getnames()
        pairs = [(a.rpartition("/")[2].split(".", 1), b) for a, b in zip(members[::2], members[1::2], strict=True)]
        assert all(ending in ("jpg", "png", "JPEG") and b.endswith(f"{key}.cls") for (key, ending), b in pairs)
        assert len(pairs) == entry["num_images"] <= 20
        keys += [(name.partition("-")[0], member) for member in members[::2]]
    assert len(set(keys)) == 48 + 32 and ("train", "disc/a%2E50%25%2Eb.jpg") in keys
    assert sorted(keys) != keys, "shuffled, for streaming"
    assert manifest["class_names"]["train"] == list(scan_images(packed.parent / "images", split="train").class_names)


def test_a_cut_off_pack_goes_on(root, packed, tmp_path, capsys):
    wanted = {path.name: path.read_bytes() for path in packed.iterdir() if path.suffix == ".tar"}
    manifest = json.loads((packed / "manifest.json").read_text())
    kept = (packed / "train-000000.tar").stat().st_mtime_ns
    for name in ("train-000001.tar", "val-000001.tar"):
        del manifest["shards"][name]
    (packed / "manifest.json").write_text(json.dumps(manifest))
    (packed / "train-000001.tar").rename(packed / "tmp_0_train-000001.tar")
    os.truncate(packed / "tmp_0_train-000001.tar", 1000)
    os.truncate(packed / "train-000002.tar", 1000)
    (packed / "index.npz").unlink()
    with pytest.raises(DataError, match="not packed to the end"):
        verify(packed)
    command = [str(root), str(packed), "--max-count=20", "--workers=2"]
    assert pack([*command, "--verify"]) == 0
    assert {path.name: path.read_bytes() for path in packed.glob("*.tar*")} == wanted
    assert (
        packed / "train-000000.tar"
    ).stat().st_mtime_ns == kept and "80 images: all as packed" in capsys.readouterr().out
    assert pack([*command, "--short-side=48"]) == EXIT_INPUT
    assert "holds shards of other images or options" in capsys.readouterr().err
    assert pack([str(root), str(root)]) == EXIT_INPUT
    assert "holds something else" in capsys.readouterr().err


def test_verify_names_a_changed_shard(packed, capsys):
    content = bytearray((packed / "val-000000.tar").read_bytes())
    content[2000] ^= 1
    (packed / "val-000000.tar").write_bytes(content)
    assert pack([str(packed), "--verify", "--workers=1"]) == EXIT_INPUT
    assert "not what was packed: val-000000.tar;" in capsys.readouterr().err
    assert pack([str(packed)]) == EXIT_INPUT
    assert "want SRC DST, or --verify" in capsys.readouterr().err


def test_resized_pack(tmp_path):
    (tmp_path / "src" / "a").mkdir(parents=True)
    ramp = np.linspace(0, 255, 300 * 200 * 3).reshape(200, 300, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "src" / "a" / "large.png")
    Image.fromarray(ramp[:100]).save(tmp_path / "src" / "a" / "small.png")
    assert pack([str(tmp_path / "src"), str(tmp_path / "dst"), "--short-side=101", "--workers=1"]) == 0
    index = find_images(tmp_path / "dst")
    assert index.sizes.tolist() == [[101, 151], [100, 300]] and index.paths == ["a/large.png", "a/small.png"]
    assert [Image.open(io.BytesIO(index.encoded(i))).format for i in range(2)] == ["JPEG", "PNG"]
    assert index.encoded(1).tobytes() == (tmp_path / "src" / "a" / "small.png").read_bytes()
    wanted = np.asarray(Image.fromarray(ramp).resize((151, 101), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(np.asarray(index.read_image(0)) - wanted).mean() < 2  # JPEG


def foreign_shard(path, labels, ending="cls"):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 30, 60)).save(buffer, "JPEG")
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            contents = {"jpg": buffer.getvalue(), "txt": b"a caption"}
            if label is not None:
                contents[ending] = str(label).encode() if ending == "cls" else json.dumps({"label": label}).encode()
            for kind, content in contents.items():
                member = tarfile.TarInfo(f"{path.stem}_{i}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_foreign_shards(tmp_path):
    foreign_shard(tmp_path / "set-train-0.tar", [3, 1])
    foreign_shard(tmp_path / "set-train-1.tar", [1], "json")
    foreign_shard(tmp_path / "set-val-0.tar", [2])
    index = find_images(tmp_path, split="train", workers=1)
    assert index.paths == ["set-train-0_1.jpg", "set-train-1_0.jpg", "set-train-0_0.jpg"]
    assert index.labels.tolist() == [1, 1, 3] and index.class_names == ("0", "1", "2", "3")
    assert index.read_image(1).size == (30, 20)
    assert scan([str(tmp_path), "--workers=1"]) == 0 and len(find_images(tmp_path, split="val")) == 1
    (tmp_path / "no").mkdir()
    foreign_shard(tmp_path / "no" / "0.tar", [None, None])
    assert find_images(tmp_path / "no").labels.tolist() == [0, 0]
    foreign_shard(tmp_path / "no" / "1.tar", [None, 5])
    index = find_images(tmp_path / "no")
    assert index.paths == ["1_1.jpg"] and index.labels.tolist() == [5]
    assert index.damaged == dict.fromkeys(["0_0.jpg", "0_1.jpg", "1_0.jpg"], "unlabelled")


def test_more_shards_than_files_may_be_open(tmp_path):
    for i in range(40):
        foreign_shard(tmp_path / f"{i}.tar", [i])
    index = find_images(tmp_path, workers=1)
    taken = set(map(int, os.listdir("/dev/fd")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (sorted(set(range(1000)) - taken)[20], hard))
        assert len({index.encoded(i).tobytes() for i in range(40)}) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.fault("a shard is cut off", "the shard is named")
@pytest.mark.parametrize("cut", [700, 11000, 20000])
def test_a_truncated_shard_is_named(packed, loader_name, cut):
    index = find_images(packed)
    victim = packed / "train-000001.tar"
    os.truncate(victim, cut)
    with pytest.raises(DataError, match=r"shard .*train-000001\.tar, which is damaged or truncated"):
        scan_images(packed, split="train", workers=1)
    with pytest.raises(DataError, match=r"truncated or changed since the scan: train-000001\.tar;"):
        find_images(packed)
    with (
        train_loader(index, loader_name, batch_size=48, color_jitter=None, workers=1) as loader,
        pytest.raises(DataError, match=r"^got shard .*train-000001\.tar of .* truncated"),
    ):
        next(loader.batches(0, 1))


@pytest.mark.fault("`pack` is killed", "it leaves no processes")
def test_a_killed_program_leaves_no_processes():
    code = """
import os, time
from tinymim_fast.data.parallel import in_parallel
def work(i):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    time.sleep(100)
list(in_parallel(work, [0, 1], 2, None))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    try:
        process.communicate(timeout=20)  # ends when nobody holds the other end
    finally:
        process.stdout.close()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
