"""One undisturbed run for all tests here that compare with one."""

import pytest

from support.programs import distill_flags


@pytest.fixture(scope="package")
def uninterrupted(world, image_folder, teacher_file, tmp_path_factory):
    """A run that nobody disturbs, with drop path and jitter: its folder, and the flags that it changes."""
    from support.runs import distil

    folder = tmp_path_factory.mktemp("uninterrupted")
    changes = {"epochs": 8, "checkpoint_interval": 5, "zero_stage": 2, "tensorboard": "true"}
    distil(world, *distill_flags(image_folder, teacher_file, folder / "run", **changes))
    return folder / "run", changes


@pytest.fixture(scope="package")
def six_steps(world, image_folder, teacher_file, tmp_path_factory):
    """The folder of a run of six steps, with checkpoints of steps 3 and 6."""
    from support.runs import SIX_STEPS, distil

    folder = tmp_path_factory.mktemp("six") / "run"
    distil(world, *distill_flags(image_folder, teacher_file, folder, **SIX_STEPS))
    return folder
