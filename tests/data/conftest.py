import os
from pathlib import Path

import pytest

from tinymim_fast.data import draw_sample_folder, scan_images

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


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory):
    return draw_sample_folder(
        tmp_path_factory.mktemp("drawn") / "sample", num_train_per_class=3, num_val_per_class=2, size=96, seed=0
    )


@pytest.fixture(scope="session")
def sample_index(sample_root):
    """48 drawn pictures, 96 px."""
    return scan_images(sample_root, split="train", workers=2)


@pytest.fixture(scope="session")
def real_index():
    """Photographs of many sizes."""
    if not REAL_IMAGES.is_dir():
        pytest.skip(f"no real images: set TINYMIM_FAST_TEST_IMAGES or put them at {REAL_IMAGES}")
    return scan_images(REAL_IMAGES, split="train", workers=2)
