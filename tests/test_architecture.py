"""The arrows of CONTRIBUTING.md's picture: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("tinymim_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def imports(path):
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers_of(package):
    return {
        str(p.relative_to(ROOT)) for p in FILES if any(n == package or n.startswith(package + ".") for n in imports(p))
    }


def test_libraries_live_in_one_place():
    of_deepspeed = {f"tinymim_fast/{name}.py" for name in ("engine", "deepspeed_config", "deepspeed_step")}
    assert importers_of("deepspeed") == of_deepspeed
    assert importers_of("nvidia") == {"tinymim_fast/data/dali_loader.py"}
    assert importers_of("jsonargparse") == {"tinymim_fast/config.py"}


ARROWS = {  # room: what of tinymim_fast it may import, rooms or single modules
    "kernels": {"kernels"},
    "tinymim_fast/batches.py": set(),
    "tinymim_fast/errors.py": set(),
    "tinymim_fast/files.py": set(),
    "tinymim_fast/distributed.py": {"errors"},
    "tinymim_fast/config.py": {"batches", "errors", "yaml_files"},
    "tinymim_fast/yaml_files.py": {"errors"},
    "tinymim_fast/data": {"data", "batches", "errors", "files"},
    "tinymim_fast/models": {"models", "errors", "files"},
    "tinymim_fast/random_streams.py": {"distributed"},
    "tinymim_fast/targets": {"targets", "models", "kernels", "errors", "random_streams"},
    "tinymim_fast/evaluation": {"evaluation", "models", "data", "errors", "files"},
    "tinymim_fast/evaluate.py": {"evaluation", "models", "data", "distributed", "errors", "checkpoint_flags"},
    "tinymim_fast/export.py": {"models", "errors", "files", "checkpoint_flags"},
    "tinymim_fast/parameter_groups.py": set(),
    "tinymim_fast/deepspeed_step.py": set(),
    "tinymim_fast/engine.py": {"deepspeed_step", "distributed", "errors", "parameter_groups", "random_streams"},
    "tinymim_fast/deepspeed_config.py": {"batches", "errors"},
    "tinymim_fast/training": {
        *(
            "training",
            "engine",
            "deepspeed_config",
            "models.checkpoints",
            "models.model_info",
            "data",
            "config",
            "batches",
            "distributed",
            "errors",
            "files",
            "random_streams",
            "yaml_files",
        )
    },
    "tinymim_fast/training/metrics.py": {"data.errors", "files"},
    "tinymim_fast/training/step.py": {"engine", "training.task"},
    "tinymim_fast/training/schedule.py": {"config"},
    "tinymim_fast/tasks": {
        *("tasks", "targets", "models", "evaluation", "data", "training.task"),
        *("config", "distributed", "errors", "files", "random_streams"),
    },
    "tinymim_fast/adapters": {"adapters", "kernels", "models.taps", "models.vit"},
    "tinymim_fast/adapters/tapped.py": set(),
    "tinymim_fast/relation_maps.py": {"errors", "models.preprocessing", "models.taps"},
    "tinymim_fast/relation_picture.py": {"files", "relation_maps"},
    "tinymim_fast/show.py": {"checkpoint_flags", "errors", "models", "relation_maps", "relation_picture"},
    "tinymim_fast/stages.py": set(),
    "tinymim_fast/chain_report.py": {"config", "files", "models.checkpoints", "training.metrics"},
    "tinymim_fast/chain.py": {
        *("chain_report", "config", "errors", "files", "models", "stages", "tasks", "yaml_files"),
        *("training.checkpoint", "training.lock", "training.resume", "training.stop"),
    },
    "tinymim_fast/train.py": {"tasks.distill", "errors", "training.program"},
    "tinymim_fast/pretrain.py": {"tasks.pretrain", "errors", "training.program"},
    "tinymim_fast/finetune.py": {"tasks.finetune", "errors", "training.program"},
}


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_know_only_what_lies_before_them(room):
    files = [p for p in FILES if p.relative_to(ROOT).is_relative_to(room)]
    assert files
    for path in files:
        ours = {n.removeprefix("tinymim_fast.") for n in imports(path) if n.startswith("tinymim_fast.")}
        unknown = [n for n in ours if not any(f"{n}.".startswith(f"{known}.") for known in ARROWS[room])]
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}"


def test_training_alone_knows_the_engine():
    """Models, data, targets and evaluation work without DeepSpeed; the demo starts training as a program."""
    assert importers_of("tinymim_fast.engine") == {
        f"tinymim_fast/training/{name}.py" for name in ("checkpoint", "ema", "loop", "program", "step", "validation")
    }


def test_kernels_need_torch_and_triton_only():
    third_party = {n.split(".")[0] for p in FILES if "kernels" in p.relative_to(ROOT).parts for n in imports(p)} - set(
        sys.stdlib_module_names
    )
    assert third_party <= {"torch", "triton", "tinymim_fast"}


def test_drop_in_import_needs_none_of_the_training_packages():
    """`pip install tinymim_fast` alone: torch, triton, numpy."""
    absent = "timm deepspeed nvidia xformers torchvision jsonargparse yaml PIL tqdm matplotlib safetensors tensorboard"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent.split()}))
import torch
from tinymim_fast import relation_kl
x = torch.randn(1, 2, 5, 4)
print(float(relation_kl(x, x, x * 2, x * 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr


def test_no_module_hides_a_library():
    """`deepspeed tinymim_fast/train.py` starts with tinymim_fast/ on the path: see the head of train.py."""
    ours = {p.stem for p in (ROOT / "tinymim_fast").iterdir() if not p.name.startswith("_")}
    assert ours & set(sys.stdlib_module_names) == set()


def test_programs_of_several_ranks_end_in_order():
    """Any that trains, or joins: see `end_process`."""
    programs = [p for p in FILES if "__main__" in p.read_text() and "data/" not in str(p)]
    joins = {"tinymim_fast.training.program", "tinymim_fast.distributed.join"}
    several = [p for p in programs if joins & imports(p)]
    assert {p.name for p in several} >= {"train.py", "pretrain.py", "evaluate.py"}
    for path in several:
        assert path.read_text().endswith('if __name__ == "__main__":\n    end_process(main())\n'), path
