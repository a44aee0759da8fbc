import json
import math

from tinymim_fast.training.metrics import Recorder, plot_curves, read_metrics


def record(step, loss=0.5):
    return {
        "step": step,
        "epoch": 0.1,
        "loss": loss,
        "qk": 0.1,
        "lr": 1e-3,
        "images_per_s": 3.0,
        "data_wait": 0.1,
        "time": 0,
    }


def recorder(folder, start_step=0, **kwargs):
    return Recorder(
        folder, **{"total_steps": 9, "start_step": start_step, "tensorboard": False, "enabled": True, **kwargs}
    )


def test_records_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    first = recorder(tmp_path)
    for step in (1, 2, 3, 4):
        first.write(record(step))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    second = recorder(tmp_path, start_step=2)
    second.write(record(3, loss=0.25))
    second.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_other_ranks_write_nothing(tmp_path):
    other = recorder(tmp_path, enabled=False)
    other.advance()
    other.write(record(1))
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_lines_are_json(tmp_path):
    one = recorder(tmp_path)
    one.write(record(1))
    one.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record(1)


def test_curves_are_drawn_even_for_a_loss_of_zero(tmp_path):
    one = recorder(tmp_path)
    for step in (1, 2, 3):
        one.write(record(step, loss=math.exp(-step) if step < 3 else 0.0))
    one.close()
    assert plot_curves(tmp_path, ("loss", "qk")).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}
