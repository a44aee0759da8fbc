import dataclasses

import numpy as np
import pytest

from tinymim_fast.batches import BatchPlan
from tinymim_fast.data import DataError, ImageIndex
from tinymim_fast.data.bad_files import BadFiles
from tinymim_fast.data.plan import EvalPlan, TrainPlan
from tinymim_fast.data.views import EvalView, TrainView


def make_index(n, sizes=(100, 120)):
    return ImageIndex(
        root="nowhere",
        paths=[f"a/{i}.jpg" for i in range(n)],
        labels=np.zeros(n, dtype=np.int64),
        class_names=("a",),
        sizes=np.broadcast_to(np.array(sizes, dtype=np.int32), (n, 2)),
    )


def make_plan(n=53, batch_size=2, rank=0, world_size=1, accumulation_steps=1):
    batches = BatchPlan(micro_batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=world_size)
    return TrainPlan(index=make_index(n), view=TrainView(img_size=32), batches=batches, seed=0, rank=rank)


def make_eval_plan(index, img_size=24, resize_size=32, batch_size=1, rank=0, world_size=1):
    view = EvalView(img_size=img_size, resize_size=resize_size)
    return EvalPlan(index=index, view=view, batch_size=batch_size, rank=rank, world_size=world_size)


def params(plan, number):
    return plan.params(number, plan.sample_ids(number))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
def test_global_batches_are_the_same_for_any_layout(world_size, accumulation_steps):
    whole = make_plan(batch_size=24)
    batch_size = 24 // world_size // accumulation_steps
    ranks = [
        make_plan(batch_size=batch_size, rank=r, world_size=world_size, accumulation_steps=accumulation_steps)
        for r in range(world_size)
    ]
    for step in range(2 * whole.steps_per_epoch + 1):  # past an epoch's end
        parts = [
            (plan.sample_ids(step * accumulation_steps + micro), params(plan, step * accumulation_steps + micro))
            for micro in range(accumulation_steps)
            for plan in ranks
        ]
        np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), whole.sample_ids(step))
        np.testing.assert_array_equal(np.concatenate([p.left for _, p in parts]), params(whole, step).left)


def test_each_sample_at_most_once_an_epoch():
    plan = make_plan(n=53, batch_size=8)
    assert plan.steps_per_epoch == 6
    epochs = [np.concatenate([plan.sample_ids(6 * epoch + i) for i in range(6)]) for epoch in range(3)]
    for ids in epochs:
        assert len(set(ids)) == 48
    assert set(epochs[0]) != set(epochs[1])  # another rest is dropped


def test_an_epoch_without_steps_is_refused():
    with pytest.raises(DataError, match=r"batches: got 60 images a step for 53 images .*, want at most 53"):
        make_plan(n=53, batch_size=15, world_size=2, accumulation_steps=2)


def test_replacements_are_cropped_to_their_own_size():
    sizes = np.random.default_rng(0).integers(20, 700, (53, 2)).astype(np.int32)
    plan = dataclasses.replace(make_plan(batch_size=53), index=make_index(53, sizes))
    bad_files = BadFiles(plan.index)
    assert plan.read_ids(0, bad_files).tolist() == plan.sample_ids(0).tolist()
    bad_files.update(dict.fromkeys(range(25), "bad"))
    ids, read_ids = plan.sample_ids(0), plan.read_ids(0, bad_files)
    sound, replaced = params(plan, 0), plan.params(0, read_ids)
    assert (read_ids[ids >= 25] == ids[ids >= 25]).all() and (read_ids >= 25).all()
    np.testing.assert_array_equal(replaced.top[ids >= 25], sound.top[ids >= 25])
    assert (replaced.top + replaced.height <= sizes[read_ids, 0]).all()
    assert (replaced.left + replaced.width <= sizes[read_ids, 1]).all()
    np.testing.assert_array_equal(replaced.flip, sound.flip)


def test_there_must_be_such_a_rank():
    with pytest.raises(DataError, match=r"rank: got 2, want 0 <= rank < world_size, 2"):
        make_plan(rank=2, world_size=2)


@pytest.mark.parametrize("n, world_size, batch_size", [(10, 1, 4), (11, 2, 4), (11, 3, 2), (2, 3, 4)])
def test_evaluation_visits_each_image_once(n, world_size, batch_size):
    seen = []
    for rank in range(world_size):
        plan = make_eval_plan(make_index(n), batch_size=batch_size, rank=rank, world_size=world_size)
        batches = [plan.sample_ids(i) for i in range(plan.num_batches)]
        assert all(len(ids) == batch_size for ids in batches[:-1]) and all(len(ids) > 0 for ids in batches)
        seen += [i for ids in batches for i in ids]
    assert seen == list(range(n))


@pytest.mark.parametrize("img_size, resize_size", [(224, 256), (224, 224), (97, 128)])
def test_sizes_and_anchors_are_torchvisions(img_size, resize_size):
    T = pytest.importorskip("torchvision.transforms")
    torch = pytest.importorskip("torch")
    for height, width in np.random.default_rng(0).integers(20, 700, (60, 2)):
        # a picture of coordinates shows which pixels were taken
        p = params(make_eval_plan(make_index(1, (height, width)), img_size, resize_size), 0)
        resized = T.Resize(resize_size)(torch.empty(1, height, width)).shape[1:]
        assert (p.height[0], p.width[0]) == tuple(resized), (height, width)
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in resized), indexing="ij")
        taken = T.CenterCrop(img_size)(torch.stack([rows, columns]))
        assert (p.top[0], p.left[0]) == tuple(taken[:, 0, 0].tolist()), (height, width)


def test_evaluation_crop_must_fit():
    with pytest.raises(DataError, match="resize_size: got 200, want at least img_size, 224"):
        EvalView(img_size=224, resize_size=200)
