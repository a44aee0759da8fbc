import pytest

from tinymim_fast.config import RunConfig
from tinymim_fast.training.schedule import lr_schedule


def test_learning_rate_schedule():
    config = RunConfig(
        data_path="d", output_dir="o", lr_base=1e-3, train_batch_size=512, min_lr=1e-5, epochs=10, warmup_epochs=2
    )
    lr_at = lr_schedule(config, 100)
    assert lr_at(0) == 0
    assert lr_at(100) == pytest.approx(1e-3)  # half of the warm-up, peak 2e-3 by the linear rule
    assert lr_at(200) == pytest.approx(2e-3)
    assert lr_at(600) == pytest.approx((2e-3 + 1e-5) / 2)
    assert lr_at(1000) == pytest.approx(1e-5)


def test_the_schedule_is_timms():
    """`CosineLRScheduler` per step with warm-up before the cosine, and `lr_scale` of a group."""
    torch = pytest.importorskip("torch")
    cosine_lr = pytest.importorskip("timm.scheduler.cosine_lr")
    config = RunConfig(data_path="d", output_dir="o", lr=2e-3, min_lr=1e-5, warmup_lr=1e-4, epochs=10, warmup_epochs=2)
    lr_at = lr_schedule(config, 10)
    groups = [{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (1.0, 0.65)]
    timms = cosine_lr.CosineLRScheduler(
        torch.optim.SGD(groups, lr=2e-3),
        t_initial=80,
        lr_min=1e-5,
        warmup_t=20,
        warmup_lr_init=1e-4,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(100):
        timms.step_update(step)
        found = [group["lr"] for group in timms.optimizer.param_groups]
        assert found == pytest.approx([lr_at(step), 0.65 * lr_at(step)], rel=1e-12), step
