import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")

from support.operators import CountReads
from support.programs import ROOT, run_training
from tinymim_fast.batches import BatchPlan
from tinymim_fast.deepspeed_config import deepspeed_config
from tinymim_fast.engine import MOMENTS, Engine, save_state
from tinymim_fast.errors import InputError
from tinymim_fast.parameter_groups import parameter_groups

BATCHES = BatchPlan(micro_batch_size=8, accumulation_steps=2, world_size=4)


def settings(**changes):
    return {"zero_stage": 1, "bf16": True, **changes}


def users_file(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def make_engine(model, world, lr_scale=None, **changes):
    ds_config = deepspeed_config(BatchPlan(micro_batch_size=64), **settings(**changes))
    return Engine(model, ds_config, world, lr_at=lr_at, weight_decay=0.1, lr_scale=lr_scale)


def test_own_configuration():
    ours = deepspeed_config(BATCHES, **settings(zero_stage=2, clip_grad=1.0))
    assert ours["zero_optimization"] == {"stage": 2, "round_robin_gradients": False}
    assert ours["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert ours["train_micro_batch_size_per_gpu"] == 8 and ours["gradient_clipping"] == 1.0
    assert ours["gradient_accumulation_steps"] == 2 and ours["train_batch_size"] == 64
    assert ours["data_types"] == {"grad_accum_dtype": "fp32"}


def test_stage_0_is_autocast_over_fp32_weights():
    ours = deepspeed_config(BATCHES, **settings(zero_stage=0))
    assert not ours["bf16"]["enabled"] and ours["torch_autocast"]["dtype"] == "bfloat16"


def test_a_users_file_is_merged(tmp_path):
    theirs = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000000, "overlap_comm": True},
        "train_batch_size": "auto",
        "comms_logger": {"enabled": True},
    }
    merged = deepspeed_config(BATCHES, **settings(), deepspeed_config=users_file(tmp_path, theirs))
    assert merged["zero_optimization"] == {**theirs["zero_optimization"], "round_robin_gradients": False}
    assert merged["train_batch_size"] == 64 and merged["comms_logger"] == {"enabled": True}
    assert merged["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage is 2, but this run has 1; make zero_stage equal",
        ),
        ({"train_batch_size": 32}, "train_batch_size is 32, but this run has 64; make train_batch_size equal"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but this run has True; make bf16 equal"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but this run has False; leave it out"),
        ({"gradient_clipping": 1.0}, "make clip_grad equal"),
        ({"zero_optimization": 2}, "zero_optimization is 2"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            "round_robin_gradients is True, but this run has False",
        ),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' is set by"),
        ("[1]", "can't be read"),
        ("{", "can't be read"),
    ],
    ids=str,
)
def test_contradictions_name_the_key_and_the_flag(tmp_path, theirs, message):
    with pytest.raises(InputError, match=message):
        deepspeed_config(BATCHES, **settings(), deepspeed_config=users_file(tmp_path, theirs))


def test_no_decay_on_one_dimensional_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].weight.requires_grad_(True)
    model.register_parameter("fixed", torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    decay, none = parameter_groups(model.parameters(), 0.05)
    assert decay["params"] == [model[0].weight] and decay["weight_decay"] == 0.05
    assert {id(p) for p in none["params"]} == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias)}
    assert none["weight_decay"] == 0.0


def test_groups_by_factor_on_the_learning_rate():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = parameter_groups(model.parameters(), 0.05, {model[0].bias: 0.5, model[1].weight: 0.5})
    found = [(g["lr_scale"], g["weight_decay"], [id(p) for p in g["params"]]) for g in groups]
    assert found == [
        (1.0, 0.05, [id(model[0].weight)]),
        (1.0, 0.0, [id(model[1].bias)]),
        (0.5, 0.0, [id(model[0].bias), id(model[1].weight)]),
    ]


def network(width=5):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.GELU(), torch.nn.Linear(width, 3))


def lr_at(step):
    return 0.01 * (step + 1)


def train_steps(engine, steps):
    for step in steps:
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        engine.backward(engine.forward(inputs).square().mean())
        engine.step()


@pytest.mark.parametrize("lr_scale", [{}, {"2.weight": 0.5, "2.bias": 0.5, "0.bias": 3.0}], ids=["", "scaled"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_state_is_that_of_adamw_and_goes_on_in_any_stage(world, tmp_path, stage, lr_scale):
    """Against PyTorch's AdamW without DeepSpeed, with another ZeRO stage after two of four steps."""
    plain = network()
    adamw = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0, "name": name}
            for name, p in plain.named_parameters()
        ],
        lr=0,
        betas=(0.9, 0.95),
    )
    for step in range(4):
        for group in adamw.param_groups:
            group["lr"] = lr_at(step) * lr_scale.get(group["name"], 1)
        plain(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        adamw.step()
        adamw.zero_grad()

    first = make_engine(network(), world, lr_scale, bf16=False, zero_stage=stage)
    train_steps(first, range(2))
    save_state(tmp_path, first.optimizer_state(), {"step": 2, "note": "ä"})
    model = network()
    model.load_state_dict(first.trained_state())
    second = make_engine(model, world, lr_scale, bf16=False, zero_stage=(stage + 1) % 4)
    assert second.load(tmp_path) == {"step": 2, "note": "ä"} and second.lr == lr_at(2)
    train_steps(second, range(2, 4))
    state = second.optimizer_state()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(second.trained_state()[name], parameter.detach())
        for moment in MOMENTS:
            torch.testing.assert_close(state[f"{moment}.{name}"], adamw.state[parameter][moment])


def test_master_weights_are_not_rounded(world):
    """bf16 weights are; what a checkpoint holds before any step is what the model was made with."""
    engine, exact = make_engine(network(), world), network().state_dict()
    state = engine.trained_state()
    assert state.keys() == exact.keys() and all(torch.equal(state[name], exact[name]) for name in exact)
    assert not torch.equal(exact["0.weight"], exact["0.weight"].bfloat16().float())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_of_gradients_is_as_large_as_the_model(world, tmp_path, stage):
    """DeepSpeed's own, 1.9 GiB, is filled at each step in fp32; a user's file wins."""
    model = network()
    engine = make_engine(model, world, bf16=False, zero_stage=stage)
    size = sum(p.numel() for p in network().parameters())
    assert engine.ds_config["zero_optimization"]["reduce_bucket_size"] == size
    assert engine._engine.optimizer.reduce_bucket_size == size
    theirs = users_file(tmp_path, {"zero_optimization": {"reduce_bucket_size": 7}})
    own = make_engine(network(), world, bf16=False, zero_stage=stage, deepspeed_config=theirs)
    assert own._engine.optimizer.reduce_bucket_size == 7
    for each in (engine, own):
        train_steps(each, range(2))
    for name, trained in engine.trained_state().items():
        torch.testing.assert_close(own.trained_state()[name], trained)


def test_state_of_another_model_is_refused(world, tmp_path):
    engine = make_engine(network(), world, bf16=False)
    with pytest.raises(InputError, match=r"optimizer\.safetensors: can't be continued from: No such file"):
        engine.load(tmp_path)
    save_state(tmp_path, make_engine(network(width=6), world, bf16=False).optimizer_state(), {"step": 1})
    with pytest.raises(InputError, match=r"exp_avg\.0\.weight is \(6, 4\), want \(5, 4\)"):
        engine.load(tmp_path)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What two ranks of stage_worker.py found at every stage."""
    results = tmp_path_factory.mktemp("stages") / "results.jsonl"
    torchrun = Path(sys.executable).parent / "torchrun"
    code, output = run_training(
        torchrun, "--standalone", "--nproc-per-node=2", ROOT / "tests" / "support" / "stage_worker.py", results
    )
    assert code == 0, output
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 24
    return rows


def test_every_stage_trains_as_plain_pytorch_on_two_ranks(stages):
    """Clipped and not, with accumulation, against fp64; bf16 rounds the weights that a gradient is taken at."""
    for row in stages:
        assert row["error"] < (5e-3 if row["bf16"] else 1e-6), row


@pytest.mark.fault(
    "one rank of two has a gradient that is NaN, with `--on-nonfinite skip`", "all ranks leave the step out", tries=8
)
def test_what_one_rank_must_skip_all_skip(stages):
    """As if the step had not been, whose learning rate is not taken later: the same test as above, and its numbers."""
    poisoned = [row for row in stages if row["poisoned"] is not None]
    assert len(poisoned) == 8 and all(row["skipped"] == [[1], [1]] for row in poisoned), poisoned
    assert all(row["skipped"] == [[], []] for row in stages if row["poisoned"] is None)


def test_no_step_reads_the_device_at_any_stage(stages):
    assert all(row["reads"] == 0 for row in stages if row["poisoned"] is None), stages


def test_the_counter_of_reads_counts():
    """What DeepSpeed asks in each step by itself."""
    with CountReads() as reads:
        bool(torch.ones(()).isfinite())
        torch.ones(()).item()
    assert reads.count >= 2
