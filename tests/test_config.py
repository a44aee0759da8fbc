import dataclasses

import pytest
import yaml

from tinymim_fast.batches import BatchPlan
from tinymim_fast.config import RECIPES, RunConfig, differences, parse, to_dict, to_yaml
from tinymim_fast.errors import InputError
from tinymim_fast.tasks.distill import DistillConfig
from tinymim_fast.tasks.finetune import FinetuneConfig
from tinymim_fast.tasks.pretrain import PretrainConfig

PATHS = ["--data-path=d", "--output-dir=o"]
DISTILL = [*PATHS, "--teacher-checkpoint=t"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_complete_runs(recipe):
    keys = yaml.safe_load(recipe.read_text())
    kind, flags = (DistillConfig, DISTILL) if "student_model" in keys else (PretrainConfig, PATHS)
    if "layer_decay" in keys:
        kind, flags = FinetuneConfig, [*PATHS, "--checkpoint=c"]
    by_path = parse(kind, [f"--config={recipe}", *flags], "p")
    assert by_path == parse(kind, ["--config", recipe.stem, *flags], "p")
    assert by_path.batch_plan(8).micro_batch_size >= 1


def test_papers_recipe():
    config = parse(DistillConfig, ["--config", "tinymim_base", *DISTILL], "p")
    assert (config.target_block, config.relation_heads, config.epochs) == (18, 16, 300)
    assert config.peak_lr == pytest.approx(1.5e-4 * 4096 / 256)


def test_command_line_wins_in_both_spellings_and_either_order(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epochs: 4\nwarmup_epochs: 2\n")
    for flag in ("--train-batch-size=64", "--train_batch_size=64"):
        config = parse(DistillConfig, [*DISTILL, flag, "--epochs", "7", "--config", str(recipe)][:], "p")
        assert config.train_batch_size == 64 and config.warmup_epochs == 2
    assert parse(DistillConfig, ["--config", str(recipe), *DISTILL, "--epochs", "7"], "p").epochs == 7


def test_launchers_flag_is_accepted():
    assert parse(DistillConfig, ["--local_rank=3", *DISTILL], "p") == parse(DistillConfig, DISTILL, "p")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--foo=1"], "foo"),
        (["--epochs=x"], "epochs"),
        (["--epochs=-1"], "--epochs: got -1"),
        (["--zero-stage=4"], "zero_stage"),
        (["--relations=[ab]"], "relations"),
        (["--relations=[qk,qk]"], "--relations"),
        (["--relation-weights=[1.0]"], "--relation-weights"),
        (["--scale=[0.5,2]"], "--scale"),
        (["--warmup-epochs=400"], "--warmup-epochs"),
        (["--lr-base=nan"], "lr_base"),
        (["--hflip=2"], "--hflip"),
        (["--mean=[123.7,116.3,103.5]"], "--mean: got .* those of 255 divided by 255"),
        (["--std=[58.4,57.1,57.4]"], "--std: got .* those of 255 divided by 255"),
        (["--teacher-mean=[127,127,127]"], "--teacher-mean: got"),
        (["--config=nope"], "nope, want a YAML file or one of the recipes"),
    ],
)
def test_impossible_values_name_the_field(flags, named):
    with pytest.raises(InputError, match=named.replace("[", r"\[")):
        parse(DistillConfig, [*DISTILL, *flags], "p")


def test_a_home_folder_in_yaml_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data_path: ~/images\noutput_dir: ~/runs/a\n")
    config = parse(DistillConfig, ["--config", str(recipe), "--teacher-checkpoint=~/t.pth"], "p")
    assert (config.data_path, config.output_dir, config.teacher_checkpoint) == (
        *("/home/me/images", "/home/me/runs/a", "/home/me/t.pth"),
    )


def test_unknown_key_in_yaml_is_named(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("epohcs: 4\n")
    with pytest.raises(InputError, match="epohcs"):
        parse(DistillConfig, ["--config", str(recipe), *DISTILL], "p")


def test_missing_flags_are_named():
    with pytest.raises(InputError, match=r"data_path.*teacher_checkpoint"):
        parse(DistillConfig, ["--output-dir=o"], "p")


@pytest.mark.parametrize(
    ("world", "micro", "accum", "plan"),
    [(1, None, None, (64, 1)), (2, None, 4, (8, 4)), (4, 8, None, (8, 2)), (2, 16, 2, (16, 2))],
)
def test_batch_plan(world, micro, accum, plan):
    config = RunConfig(
        data_path="d",
        output_dir="o",
        train_batch_size=64,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accum,
    )
    micro, accum = plan
    assert config.batch_plan(world) == BatchPlan(micro_batch_size=micro, accumulation_steps=accum, world_size=world)


@pytest.mark.parametrize(("world", "micro", "accum"), [(3, None, None), (1, 24, None), (128, None, None), (2, 16, 4)])
def test_batch_size_that_ranks_dont_divide(world, micro, accum):
    config = RunConfig(
        data_path="d",
        output_dir="o",
        train_batch_size=64,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accum,
    )
    with pytest.raises(InputError, match=rf"train_batch_size: got 64.*ranks \({world}\)"):
        config.batch_plan(world)


def test_saved_configuration_round_trips_and_differences_are_named():
    config = parse(DistillConfig, [*DISTILL, "--student-model-kwargs", '{"depth": 3}'], "p")
    saved = yaml.safe_load(to_yaml(config))
    assert saved == to_dict(config)
    assert differences(saved, config) == []
    assert differences(saved, dataclasses.replace(config, workers=1, log_interval=3)) == []
    assert differences(saved, dataclasses.replace(config, epochs=5, warmup_epochs=1.0)) == [
        "epochs: 300 -> 5",
        "warmup_epochs: 15.0 -> 1.0",
    ]


def test_configuration_is_frozen():
    config = parse(PretrainConfig, PATHS, "p")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 1
