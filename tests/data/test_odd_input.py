"""Files as they come: types, value ranges, pipes, files that change under a run. No start may die by a signal or hang."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from support.loaders import train_loader
from support.programs import ROOT
from tinymim_fast.data import DataError, find_images, scan_images
from tinymim_fast.data.pack import pack

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


def test_the_value_range_is_the_files(tmp_path, loader_name):
    write_ranges(tmp_path / "ranges" / "c")
    index = scan_images(tmp_path / "ranges", workers=1)
    assert index.damaged == {} and len(index) == 14
    with train_loader(index, loader_name, batch_size=14, **WHOLE) as loader:
        (views,) = next(loader.batches(0, 1))
        means = dict(zip((index.paths[i] for i in loader.plan.sample_ids(0)), 255 * views.mean(dim=(1, 2, 3)).numpy()))
        assert loader.bad_files.reasons == {}
    assert all(abs(mean - 127.2) < 0.8 for mean in means.values()), means


def test_values_without_a_range_are_refused(tmp_path):
    (tmp_path / "c").mkdir()
    Image.fromarray((GREY * 300).astype(np.int32)).save(tmp_path / "c" / "int.tif")
    Image.fromarray((GREY - 100).astype(np.float32)).save(tmp_path / "c" / "negative.tif")
    Image.fromarray(np.where(GREY > 100, np.nan, GREY).astype(np.float32)).save(tmp_path / "c" / "nan.tif")
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "c" / "plain.png")
    damaged = scan_images(tmp_path).damaged
    assert damaged.keys() == {"c/int.tif", "c/negative.tif", "c/nan.tif"}
    assert damaged["c/int.tif"].startswith("unsupported: integers of 32 bits")
    assert damaged["c/negative.tif"] == "unsupported: floating-point values from -100 to 155, want 0 to 1 or 0 to 255"


def test_what_changed_since_the_scan_is_found_before_decoding(noise, loader_name):
    """Six starts with each kind of changed file among others: DALI's decoders ended four of six by SIGSEGV with some of these."""
    code = """
        import os, sys
        import numpy as np
        from PIL import Image
        from support.loaders import eval_loader, train_loader
        from tinymim_fast.data import DataError, scan_images
        index = scan_images(sys.argv[1], workers=1)
        file = index.file(24)
        changes = {
            "integers": lambda: Image.fromarray(np.arange(4800, dtype=np.int32).reshape(60, 80)).save(file, format="TIFF"),
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


def test_a_pipe_is_not_waited_for(noise):
    os.mkfifo(noise / "c" / "x.jpg")
    (noise / "c" / "y.jpg").symlink_to("/dev/zero")
    code, output = run_python(
        "import sys; from tinymim_fast.data.scan import main; main(sys.argv[1:])", noise, "--workers=1"
    )
    assert code == 0 and "50 images in 1 classes, 2 left out" in output, output
    assert "c/x.jpg: no regular file" in output and "c/y.jpg: no regular file" in output


@pytest.mark.parametrize("loader_name", ["dali", "torchvision"])
def test_a_shard_that_shrinks_while_it_is_read_is_named(noise, tmp_path, loader_name):
    """A memory map would end the process by SIGBUS."""
    pytest.importorskip({"dali": "nvidia.dali"}.get(loader_name, loader_name))
    pack(noise, tmp_path / "packed", workers=1)
    code = """
        import os, sys
        from support.loaders import train_loader
        from tinymim_fast.data import DataError, find_images
        index = find_images(sys.argv[1])
        with train_loader(index, sys.argv[2], batch_size=4, workers=1) as loader:
            batches = loader.batches(0, 40)
            next(batches)
            os.truncate(os.path.join(sys.argv[1], "train-000000.tar"), 1000)
            try:
                list(batches)
            except DataError as error:
                print(error)
    """
    code, output = run_python(code, tmp_path / "packed", loader_name)
    assert code == 0 and "train-000000.tar of 1000 bytes, which ends before an indexed image" in output, (code, output)


def test_more_pixels_than_allowed_are_damaged(tmp_path):
    (tmp_path / "c").mkdir()
    Image.new("L", (300, 200)).save(tmp_path / "c" / "large.png")
    Image.new("L", (200, 200)).save(tmp_path / "c" / "small.png")
    index = find_images(tmp_path, workers=1, max_image_pixels=50_000)
    assert index.paths == ["c/small.png"]
    assert index.damaged == {"c/large.png": "huge: 300 x 200, more than 50,000 pixels"}
    with pytest.raises(DataError, match="max_image_pixels: got 0, want 1 to 178,956,970"):
        find_images(tmp_path, workers=1, max_image_pixels=0)
