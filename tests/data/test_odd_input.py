"""Files as they come: types, value ranges, pipes, files that change under a run. None may kill or hang a start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from support.loaders import copies, eval_loader, train_loader
from support.programs import ROOT
from tinymim_fast.data import DataError, find_images, scan_images
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.pack import main as pack_main
from tinymim_fast.data.pack import pack
from tinymim_fast.data.scan import main as scan
from tinymim_fast.data.scan import names_by_verdict

GREY = np.tile(np.linspace(0, 255, 64), (64, 1))  # mean 127.5 of 255
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": None, **PLAIN}


def run_python(code, *arguments, timeout=60):
    """Exit code and output of a program; a signal shows as a negative code."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, cwd=ROOT.parent
    )
    return done.returncode, done.stdout


@pytest.fixture
def noise(tmp_path):
    """48 JPEGs in one class folder."""
    folder = tmp_path / "noise" / "c"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(48):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(folder / f"{i:02d}.jpg")
    return tmp_path / "noise"


def write_ranges(folder):
    """The same grey ramp in many value ranges and colour spaces."""
    folder.mkdir(parents=True)
    rgb = Image.fromarray(np.stack([GREY] * 3, axis=-1).astype(np.uint8))
    Image.fromarray((GREY / 255).astype(np.float32)).save(folder / "float_to_1.tif")
    Image.fromarray(GREY.astype(np.float32)).save(folder / "float_to_255.tif")
    Image.fromarray((GREY * 257).astype(np.uint16)).save(folder / "deep.tif")
    Image.fromarray((GREY * 257).astype(np.uint16)).save(folder / "deep.png")
    (folder / "ten_bit.pgm").write_bytes(b"P5\n64 64\n1023\n" + (GREY * 1023 / 255).astype(">u2").tobytes())
    (folder / "seven_bit.pgm").write_bytes(b"P5\n64 64\n100\n" + np.rint(GREY * 100 / 255).astype(np.uint8).tobytes())
    rgb.convert("LAB").save(folder / "lab.tif")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("YCbCr").save(folder / "ycbcr.tif")
    rgb.convert("L").save(folder / "grey.bmp")
    rgb.convert("P").save(folder / "palette.png")
    rgb.save(folder / "lossless.webp", lossless=True)
    rgb.save(folder / "animated.webp", save_all=True, append_images=[rgb], lossless=True)
    rgb.save(folder / "plain.ppm")


@pytest.mark.fault(
    "images of floating point, 7 to 16 bits, CMYK, Lab, YCbCr, palettes",
    "both loaders give the picture that the file says",
    tries=28,
)
def test_the_value_range_is_the_files(tmp_path, loader_name):
    write_ranges(tmp_path / "ranges" / "c")
    index = scan_images(tmp_path / "ranges", workers=1)
    assert index.damaged == {} and len(index) == 14
    with train_loader(index, loader_name, batch_size=14, **WHOLE) as loader:
        (views,) = next(loader.batches(0, 1))
        means = dict(zip((index.paths[i] for i in loader.plan.sample_ids(0)), 255 * views.mean(dim=(1, 2, 3)).numpy()))
        assert loader.bad_files.reasons == {}
    assert all(abs(mean - 127.2) < 0.8 for mean in means.values()), means


@pytest.mark.fault(
    "images whose range of values no file tells",
    "told by the scan, replaced in training, refused in evaluation",
    tries=2,
)
def test_values_without_a_range_are_replaced(tmp_path, loader_name):
    (tmp_path / "c").mkdir()
    Image.fromarray((GREY * 300).astype(np.int32)).save(tmp_path / "c" / "int.tif")
    Image.fromarray((GREY - 100).astype(np.float32)).save(tmp_path / "c" / "negative.tif")
    Image.fromarray(np.where(GREY > 100, np.nan, GREY).astype(np.float32)).save(tmp_path / "c" / "nan.tif")
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "c" / "plain.png")
    index = scan_images(tmp_path)
    wanted = {"c/int.tif", "c/nan.tif", "c/negative.tif"}
    assert set(names_by_verdict(index)["no-range"]) == wanted and index.damaged == {}
    assert BadFiles(index).by_path.keys() == wanted and BadFiles(index, 0.5).too_many
    for name in wanted:
        with pytest.raises(
            DataError, match=r"floating-point values from|integers of 32 bits, whose range no file tells"
        ):
            index.read_image(index.paths.index(name))
    with train_loader(index, loader_name, batch_size=4, workers=1, **WHOLE) as loader:
        ((views,),) = loader.batches(0, 1)
        assert (255 * views.mean(dim=(1, 2, 3)) - 127).abs().max() < 1, "the fourth, four times"
    with pytest.raises(DataError, match=r"3 images can't be decoded: c/int\.tif"):
        eval_loader(index, loader_name)


@pytest.mark.fault(
    "an image becomes another type, size, a pipe or a folder after the scan",
    "found before a decoder sees it, replaced and named; no start dies by a signal",
    tries=42,
)
def test_what_changed_since_the_scan_is_found_before_decoding(noise, loader_name):
    """Six starts with each kind of changed file: DALI's decoders ended four of six by SIGSEGV with some of these."""
    code = """
        import os, sys
        import numpy as np
        from PIL import Image
        from support.loaders import eval_loader, train_loader
        from tinymim_fast.data import DataError, scan_images
        index = scan_images(sys.argv[1], workers=1)
        file = index.file(24)
        changes = {
            "integers": lambda: Image.fromarray(np.ones((60, 80), dtype=np.int32)).save(file, format="TIFF"),
            "larger": lambda: Image.new("RGB", (160, 120)).save(file),
            "smaller": lambda: Image.new("RGB", (8, 6)).save(file),
            "gif": lambda: Image.new("RGB", (80, 60)).save(file, format="GIF"),
            "pipe": lambda: (os.remove(file), os.mkfifo(file)),
            "folder": lambda: (os.remove(file), os.mkdir(file)),
        }
        for name, change in changes.items():
            change()
            for _ in range(6 if sys.argv[2] == "dali" else 1):
                with train_loader(index, sys.argv[2], batch_size=48, workers=4 * (sys.argv[2] == "dali")) as loader:
                    assert len(next(loader.batches(0, 1))[0]) == 48
                    assert loader.bad_files.reasons.keys() == {24}, loader.bad_files.reasons
            try:
                with eval_loader(index, sys.argv[2], batch_size=48, workers=1) as evaluation:
                    list(evaluation)
            except DataError as error:
                assert str(error).startswith("got " + file), error
                print(name, loader.bad_files.reasons[24], flush=True)
    """
    code, output = run_python(code, noise, loader_name, timeout=120)
    assert code == 0, (code, output)
    reasons = dict(line.split(" ", 1) for line in output.splitlines())
    assert reasons.keys() == {"integers", "larger", "smaller", "gif", "pipe", "folder"}
    assert reasons["larger"] == "120 x 160 pixels, not the indexed 60 x 80"
    assert reasons["smaller"] == "6 x 8 pixels, not the indexed 60 x 80"
    assert reasons["pipe"] == reasons["folder"] == "no regular file"


@pytest.mark.fault(
    "bytes of an image are changed at random, before or after the scan",
    "decoded, or replaced and named; no start dies by a signal",
    tries=30,
)
def test_changed_bytes_never_end_the_process(noise):
    pytest.importorskip("nvidia.dali")
    code = """
        import sys
        import numpy as np
        from PIL import Image
        from support.loaders import train_loader
        from tinymim_fast.data import scan_images
        rng = np.random.default_rng(0)
        file = sys.argv[1] + "/c/24.jpg"
        ramp = np.arange(60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
        tries = bad = 0
        for format in ("JPEG", "PNG", "WEBP"):
            for _ in range(5):
                Image.fromarray(ramp).save(file, format=format)
                index = scan_images(sys.argv[1], workers=1)
                content = bytearray(open(file, "rb").read())
                for at in rng.integers(4, 200 if rng.random() < 0.7 else len(content), rng.integers(1, 6)):
                    content[at] = rng.integers(256)
                open(file, "wb").write(content[: rng.integers(100, len(content)) if rng.random() < 0.2 else None])
                for seen in (index, scan_images(sys.argv[1], workers=1)):
                    with train_loader(seen, "dali", batch_size=len(seen), workers=4) as loader:
                        next(loader.batches(0, 1))
                        tries += 1
                        bad += bool(loader.bad_files.by_path)
        print(tries, bad)
    """
    code, output = run_python(code, noise, timeout=300)
    assert code == 0, (code, output)
    tries, bad = map(int, output.splitlines()[-1].split())
    assert tries == 30 and 8 < bad < 30, output


@pytest.mark.fault("a pipe or a device is called x.jpg", "left out by the scan and named, not waited for", tries=2)
def test_a_pipe_is_not_waited_for(noise):
    os.mkfifo(noise / "c" / "x.jpg")
    (noise / "c" / "y.jpg").symlink_to("/dev/zero")
    command = [sys.executable, "-m", "tinymim_fast.data.scan", str(noise), "--workers=1"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60, cwd=ROOT)
    code, output = done.returncode, done.stdout
    assert done.stderr == ""
    assert code == 0 and "50 images in 1 classes, 2 left out" in output, output
    assert "c/x.jpg: no regular file" in output and "c/y.jpg: no regular file" in output


@pytest.mark.fault("a shard shrinks while it is read", "one line that names it; no SIGBUS", tries=2)
def test_a_shard_that_shrinks_while_it_is_read_is_named(noise, tmp_path):
    """A memory map would end the process by SIGBUS."""
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("torchvision")
    pack(noise, tmp_path / "packed", workers=1)
    code = """
        import os, sys
        from support.loaders import train_loader
        from tinymim_fast.data import DataError, find_images
        index = find_images(sys.argv[1])
        shard = os.path.join(sys.argv[1], "train-000000.tar")
        content = open(shard, "rb").read()
        for name in ("dali", "torchvision"):
            with train_loader(index, name, batch_size=4, workers=1) as loader:
                batches = loader.batches(0, 40)
                next(batches)
                os.truncate(shard, 1000)
                try:
                    list(batches)
                except DataError as error:
                    print(name, error)
            with open(shard, "r+b") as file:
                file.write(content)
    """
    code, output = run_python(code, tmp_path / "packed")
    assert code == 0, (code, output)
    for name, line in zip(("dali", "torchvision"), output.splitlines(), strict=True):
        assert line.startswith(f"{name} got shard "), output
        assert "train-000000.tar of 1000 bytes, which ends before an indexed image" in line


def test_more_pixels_than_allowed_are_damaged(tmp_path):
    (tmp_path / "c").mkdir()
    Image.new("L", (300, 200)).save(tmp_path / "c" / "large.png")
    Image.new("L", (200, 200)).save(tmp_path / "c" / "small.png")
    index = find_images(tmp_path, workers=1, max_image_pixels=50_000)
    assert index.paths == ["c/small.png"]
    assert index.damaged == {"c/large.png": "huge: 300 x 200, more than 50,000 pixels"}
    with pytest.raises(DataError, match="max_image_pixels: got 0, want 1 to 178,956,970"):
        find_images(tmp_path, workers=1, max_image_pixels=0)


HOSTILE = "x\x1b[2J\r\n\x9bevil\u202e.jpg"


@pytest.mark.fault(
    "file names with line breaks and terminal escapes", "shown escaped in logs, lists and errors", tries=1
)
def test_names_are_shown_escaped(noise, caplog, capfd):
    (noise / "c" / HOSTILE).write_bytes(b"no picture")
    assert scan([str(noise), "--workers=1"]) == 0
    index = find_images(noise)
    assert list(index.damaged) == [f"c/{HOSTILE}"]
    bad_files = BadFiles(index)
    said = [str(bad_files.error()), caplog.text, capfd.readouterr().out]
    with pytest.raises(DataError) as caught:
        find_images(noise / "c\x1b[31m\n")
    said.append(str(caught.value))
    for text in said:
        assert "\x1b" not in text and "\x9b" not in text and "\u202e" not in text and "\r" not in text, text
    for text in said[:3]:
        assert r"x\x1b[2J\r\n\x9bevil\u202e.jpg" in text
    assert len(said[0].splitlines()) == len(said[3].splitlines()) == 1


def altered(path, out, **changes):
    """The index at `path` with some arrays changed, at `out`."""
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    np.savez(out, **{**arrays, **{f"/{name}": value(arrays[f"/{name}"]) for name, value in changes.items()}})


def pack_names(*names):
    return np.frombuffer(b"".join(name + b"\0" for name in names), dtype=np.uint8)


@pytest.mark.fault(
    "an index with few labels, paths that leave its folder, or pickles", "refused, with what is wrong", tries=8
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": lambda a: a[:-1]}, r"labels of int64 \(47,\), want integers \(48,\)"),
        ({"labels": lambda a: a + 1}, "labels 1 to 1 for 1 classes"),
        ({"labels": lambda a: a.astype(float)}, "labels of float64"),
        ({"sizes": lambda a: a * 0}, "images without pixels"),
        (
            {"paths": lambda a: pack_names(*[b"../../etc/x.jpg"] * 48)},
            r"\.\./\.\./etc/x\.jpg, which leaves the data set's folder",
        ),
        ({"paths": lambda a: pack_names(*[b"/etc/x.jpg"] * 48)}, "/etc/x.jpg, which leaves"),
        ({"root": lambda a: pack_names(b"../..")}, r"\.\./\.\., which leaves"),
        ({"labels": lambda a: np.array([None] * 48)}, "Object arrays cannot be loaded"),
    ],
    ids=["few_labels", "other_labels", "float_labels", "no_pixels", "parent", "absolute", "root", "pickle"],
)
def test_an_index_that_no_scan_writes_is_refused(noise, tmp_path, change, message):
    scan([str(noise), "--workers=1"])
    altered(noise / "index.npz", tmp_path / "index.npz", **change)
    with pytest.raises(
        DataError, match=rf"want an image index written by .*{message}" if "want" not in message[:4] else message
    ):
        find_images(tmp_path / "index.npz")


@pytest.mark.fault("an index or a shard that claims gigabytes", "refused or left out, not unpacked", tries=1)
def test_an_index_that_unpacks_to_more_is_not_unpacked(tmp_path):
    path = tmp_path / "index.npz"
    np.savez_compressed(path, format=np.zeros(1 << 26, dtype=np.uint8))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="compressed arrays"):
        find_images(path)


def test_an_index_of_the_format_before_loads(noise, tmp_path):
    """It had PIL's format and mode of each image."""
    scan([str(noise), "--workers=1"])
    altered(noise / "index.npz", tmp_path / "index.npz")
    with np.load(noise / "index.npz") as data:
        old = {name: data[name] for name in data.files} | {
            "/formats": np.full(48, "JPEG"),
            "/modes": np.full(48, "RGB"),
        }
    np.savez(tmp_path / "index.npz", **old)
    index = find_images(tmp_path / "index.npz")
    assert len(index) == 48 and index.read_image(0).size == (80, 60)


@pytest.mark.fault(
    "pictures of 1 x 5000 and 600 x 80,000 pixels", "trained on, evaluated and packed without gigabytes", tries=6
)
def test_very_long_pictures_cost_little(tmp_path, loader_name):
    """Of 1 x 5000 pixels, all of the resized picture would be a gigabyte."""
    folder = tmp_path / "src" / "c"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 255, 5000).astype(np.uint8)
    Image.fromarray(ramp[None]).save(folder / "flat.png")
    Image.fromarray(ramp[:, None]).save(folder / "tall.png")
    Image.fromarray(np.full((600, 80_000), 127, dtype=np.uint8)).save(folder / "wide.png")
    index = scan_images(tmp_path / "src", workers=1)
    with eval_loader(index, loader_name, img_size=224, resize_size=256, workers=0, **PLAIN) as loader:
        ((images, _, _),) = loader
        resized = loader.plan.params(0, loader.plan.sample_ids(0))
    assert (resized.height * resized.width).max() < 5e6
    means = 255 * images.mean(dim=(1, 2, 3))
    assert torch.allclose(means, torch.tensor([127.0, 127.0, 127.0]), atol=1.5), means
    with train_loader(index, loader_name, batch_size=3, workers=0) as loader:
        assert len(next(loader.batches(0, 1))[0]) == 3
    assert pack_main([str(tmp_path / "src"), str(tmp_path / "dst"), "--short-side=512", "--workers=1"]) == 0
    packed = find_images(tmp_path / "dst")
    assert packed.sizes.tolist() == [[1, 5000], [5000, 1], [600, 80_000]]


@pytest.mark.fault("a data worker is killed", "another one makes its batches, bitwise", tries=1)
def test_a_killed_worker_is_replaced(noise, caplog):
    pytest.importorskip("torchvision")
    with train_loader(scan_images(noise, workers=1), "torchvision") as loader:
        whole = copies(loader.batches(0, 12))
        batches = loader.batches(0, 12)
        found = [next(batches)]
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        found += batches
    assert all(torch.equal(a, b) for a, b in zip(whole, copies(found), strict=True))
    assert "a data worker was killed" in caplog.text


@pytest.mark.fault("data workers are killed each time", "one line that names --workers", tries=1)
def test_workers_that_are_killed_each_time_end_the_run_in_one_line(noise, monkeypatch):
    torchvision_loader = pytest.importorskip("tinymim_fast.data.torchvision_loader")
    monkeypatch.setattr(torchvision_loader, "_MAX_DEATHS", 1)
    monkeypatch.setattr(
        torchvision_loader._TrainBatches, "__getitem__", lambda self, number: os.kill(os.getpid(), signal.SIGKILL)
    )
    with (
        train_loader(scan_images(noise, workers=1), "torchvision") as loader,
        pytest.raises(
            DataError, match=r"^workers: got 2, of which some were killed 1 times in a row, for want of memory"
        ),
    ):
        next(loader.batches(0, 2))
