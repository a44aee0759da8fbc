"""A user's DeepSpeed file: what DeepSpeed would crash on, ignore or take long over is one line first."""

import pytest

pytest.importorskip("deepspeed")

from support.programs import distill_flags, run_forked
from tinymim_fast.batches import BatchPlan
from tinymim_fast.deepspeed_config import deepspeed_config
from tinymim_fast.errors import EXIT_INPUT, InputError

PLAN = BatchPlan(micro_batch_size=4, accumulation_steps=1, world_size=1)
UNREADABLE = {
    "no JSON": (b"hello", "Expecting value"),
    "empty": (b"", "Expecting value"),
    "a list": (b"[1]", "not a JSON object"),
    "UTF-16": ("{}".encode("utf16"), "codec can't decode"),
    "too deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "recursion"),
    "too large": (b" " * (1 << 20) + b"{}", "bytes, want at most"),
    "twice": (b'{"zero_optimization": {"a": 1, "a": 2}}', "the key a stands there twice"),
    "misspelt": (b'{"gradient_cliping": 1.0}', "gradient_cliping: did you mean gradient_clipping"),
    "no number": (b'{"steps_per_print": "ten"}', "steps_per_print is 'ten', want a whole number"),
    "not a number": (b'{"gradient_clipping": NaN}', "gradient_clipping is nan, but this run has 0.0"),
}
REFUSED_BY_DEEPSPEED = {
    "type": (
        b'{"zero_optimization": {"reduce_bucket_size": "abc"}}',
        "reduce_bucket_size: Input should be a valid integer",
    ),
    "unknown": (
        b'{"zero_optimization": {"reduce_buket_size": 5}}',
        "reduce_buket_size: Extra inputs are not permitted",
    ),
    "removed": (b'{"elasticity": {"enabled": true}}', "Elastic training has been removed"),
    "no message": (b'{"tensor_parallel": {"autotp_size": 2}}', "DeepSpeed refuses it: AssertionError"),
}


@pytest.mark.fault("a bad value in DeepSpeed's JSON, in any encoding", "code 2, one line that names file and key")
@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_bad_files_are_one_line(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        deepspeed_config(PLAN, zero_stage=1, bf16=False, deepspeed_config=path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_byte_order_mark_is_harmless(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b'\xef\xbb\xbf{"wall_clock_breakdown": false}')
    assert deepspeed_config(PLAN, zero_stage=1, bf16=False, deepspeed_config=path)["wall_clock_breakdown"] is False


@pytest.mark.fault("a bad value in DeepSpeed's JSON, in any encoding", "code 2, one line that names file and key")
@pytest.mark.parametrize(("content", "message"), REFUSED_BY_DEEPSPEED.values(), ids=REFUSED_BY_DEEPSPEED)
def test_what_deepspeed_refuses_is_one_line_and_nothing_is_written(
    image_folder, teacher_file, tmp_path, content, message
):
    (tmp_path / "ds.json").write_bytes(content)
    flags = distill_flags(image_folder, teacher_file, tmp_path / "run", deepspeed_config=tmp_path / "ds.json")
    code, output = run_forked("train", *flags)
    assert code == EXIT_INPUT and "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith("train.py: --deepspeed-config: ") and message in last
    assert not (tmp_path / "run").exists()
