import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tinymim_fast.data import draw_image_folder, scan_images

REAL_IMAGES = Path(
    os.environ.get(
        "TINYMIM_FAST_TEST_IMAGES", Path(__file__).parents[2].parent / "shared" / "data" / "imagenet_samples"
    )
)


@pytest.fixture(params=["dali", "torchvision"])
def loader_name(request):
    """Each installed loader in turn."""
    pytest.importorskip({"dali": "nvidia.dali", "torchvision": "torchvision"}[request.param])
    return request.param


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda:0",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ]
)
def device(request):
    """Where views are wanted: on a GPU, DALI decodes there."""
    return request.param


@pytest.fixture(scope="session")
def drawn_root(tmp_path_factory):
    return draw_image_folder(
        tmp_path_factory.mktemp("drawn") / "sample", num_train_per_class=3, num_val_per_class=2, size=96, seed=0
    )


@pytest.fixture(scope="session")
def drawn_index(drawn_root):
    """48 drawn pictures, 96 px."""
    return scan_images(drawn_root, split="train", workers=2)


@pytest.fixture(scope="session")
def real_index():
    """Photographs of many sizes."""
    if not REAL_IMAGES.is_dir():
        pytest.skip(f"no real images: set TINYMIM_FAST_TEST_IMAGES or put them at {REAL_IMAGES}")
    return scan_images(REAL_IMAGES, split="train", workers=2)


HUGE = b"\xff\xff" * 2  # height and width, 65,535 pixels


@pytest.fixture
def odd_root(drawn_root, tmp_path):
    """The drawn folder with one file of each damaged and each odd kind in train/disc/."""
    shutil.copytree(drawn_root, tmp_path / "odd")
    folder = tmp_path / "odd" / "train" / "disc"
    whole = (folder / "00000.jpg").read_bytes()
    picture = Image.open(io.BytesIO(whole))
    (folder / "truncated.jpg").write_bytes(whole[:-100])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    size_at = whole.index(b"\xff\xc0") + 5
    (folder / "huge.jpg").write_bytes(whole[:size_at] + HUGE + whole[size_at + 4 :])
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("L").save(folder / "grey.jpg")
    picture.save(folder / "png.JPEG", format="PNG")
    Image.fromarray(np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16)).save(folder / "deep.png")
    picture.save(folder / "inside.bmp")  # its header does not tell
    os.truncate(folder / "inside.bmp", 5000)
    return tmp_path / "odd"
