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
