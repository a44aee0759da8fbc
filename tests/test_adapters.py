"""The page of adapters runs as it stands; timm's task and the tap are the paper's loss however they are run."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import timm

from support.programs import ROOT, run_training
from tinymim_fast import RelationLoss, Tapped
from tinymim_fast.adapters import RelationDistillationTask
from tinymim_fast.models.taps import Place, Taps

PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
SNIPPETS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}


def test_all_the_sections_have_snippets():
    assert list(SNIPPETS) == ["timm", "Hugging Face Trainer", "Lightning", "Accelerate", "NVIDIA Model Optimizer"]
    assert [len(blocks) for blocks in SNIPPETS.values()] == [1, 1, 1, 1, 2]


def missing(snippet):
    """A package that it imports and that is not installed."""
    nodes = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0] for node in nodes}
    return next((name for name in sorted(names) if importlib.util.find_spec(name) is None), None)


@pytest.mark.parametrize("section", SNIPPETS)
def test_a_section_of_the_page_trains(section):
    """Its losses are finite and fall."""
    torch.manual_seed(0)
    names = {"__name__": "snippet"}
    for snippet in SNIPPETS[section]:
        if (package := missing(snippet)) is not None:
            pytest.skip(f"{package} is not installed")
        exec(compile(snippet, "docs/adapters.md", "exec"), names)
    losses = torch.tensor(names["losses"])
    assert losses.isfinite().all() and losses[-1] < 0.9 * losses[0], losses


def test_the_criterion_is_called_as_model_optimizer_documents_it():
    """`criterion[student layer, teacher layer](student output, teacher output)`: a `_Loss` and a scalar."""
    names = {"__name__": "snippet"}
    exec(SNIPPETS["NVIDIA Model Optimizer"][0], names)
    criterion = names["RelationCriterion"](relation_heads=3)
    qkv_s, qkv_t = torch.randn(2, 5, 36, requires_grad=True), torch.randn(2, 5, 72)
    loss = criterion(qkv_s, qkv_t)
    assert isinstance(criterion, nn.modules.loss._Loss) and loss.ndim == 0
    torch.testing.assert_close(loss, RelationLoss(3)(qkv_s, qkv_t)["loss"])
    loss.backward()
    assert qkv_s.grad.any()


def vits(**kwargs):
    torch.manual_seed(0)
    sizes = {"depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 0, "num_heads": 3, **kwargs}
    return [timm.create_model("vit_tiny_patch16_224", embed_dim=width, **sizes) for width in (48, 96)]


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_formula(student, teacher, images_t=IMAGES):
    """The loss from hooks of this test's own and the formula in fp64."""
    found = {}
    for name, vit, images in (("s", student, IMAGES), ("t", teacher, images_t)):
        handle = vit.blocks[-1].attn.qkv.register_forward_hook(lambda m, a, out, name=name: found.update({name: out}))
        vit.eval()(images)
        handle.remove()
    heads = {name: qkv.double().unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4) for name, qkv in found.items()}
    loss = 0
    for x, y in ((0, 1), (2, 2)):
        log_s, log_t = (
            torch.log_softmax(heads[name][x] @ heads[name][y].mT * heads[name].shape[-1] ** -0.5, -1) for name in "st"
        )
        loss = loss + (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return loss


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_the_task_is_the_formula(compiled):
    student, teacher = vits()
    want = by_formula(student, teacher)
    task = RelationDistillationTask(student, teacher, backend="chunked")
    if compiled:
        task.compile(backend="aot_eager", fullgraph=True)
    result = task(IMAGES, target=None)
    torch.testing.assert_close(result["loss"].double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(result["loss"], result["qk"] + result["vv"])
    result["loss"].backward()
    trained = dict(task.get_trainable_module().named_parameters())
    assert all(p.grad is not None for p in trained.values()) and not any(
        p.grad is not None for p in teacher.parameters()
    )
    assert not any("mlp" in name for name in trained if "blocks.1." in name), "behind the tap"


def test_the_tasks_teacher_gets_a_view_of_its_own():
    student, teacher = vits()
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    mean, std, mean_t, std_t = (
        torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for vit in (student, teacher) for key in ("mean", "std")
    )
    want = by_formula(student, teacher, (IMAGES * std + mean - mean_t) / std_t)
    loss = RelationDistillationTask(student, teacher)(IMAGES)["loss"]
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=0)
    assert not torch.isclose(loss.double(), by_formula(student, teacher), rtol=1e-3)


def test_the_tasks_checkpoint_is_the_whole_student():
    """And the average's: what trained from the average, the rest as it was."""
    student, teacher = vits()
    task = RelationDistillationTask(student, teacher).train()
    assert not teacher.training and student.training
    task.setup_ema(decay=0.5)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=10.0)
    task(IMAGES)["loss"].backward()
    optimizer.step()
    task.update_ema()
    saved, averaged = (task.get_checkpoint_state(ema=ema) for ema in (False, True))
    assert saved["state_dict"].keys() == averaged["state_dict_ema"].keys() == before.keys()
    for name, now in student.state_dict().items():
        assert torch.equal(saved["state_dict"][name], now)
        torch.testing.assert_close(averaged["state_dict_ema"][name], (before[name] + now) / 2)
    assert not torch.equal(before["blocks.1.attn.qkv.weight"], student.blocks[1].attn.qkv.weight)
    task.load_checkpoint_state(before)
    assert torch.equal(
        task.get_trainable_module().taps.model.blocks[1].attn.qkv.weight, before["blocks.1.attn.qkv.weight"]
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_a_tap_by_hooks_is_a_tap(compiled):
    student, _ = vits()
    student.eval()
    want = Taps(student, [Place("qkv", 2)])(IMAGES)[Place("qkv", 2)]
    tapped = Tapped(student, "blocks.1.attn.qkv")
    run = torch.compile(tapped, backend="aot_eager", fullgraph=True) if compiled else tapped
    for _ in range(2):
        torch.testing.assert_close(run(IMAGES), want)
    student(IMAGES)
    assert not tapped._found, "what the model computes without the tap is not held"


def test_several_projections_stand_side_by_side():
    model = nn.ModuleDict({"q": nn.Linear(4, 6), "v": nn.Linear(4, 2)})
    model.forward = lambda x: (model["v"](x), model["q"](x))
    x = torch.randn(2, 5, 4)
    assert torch.equal(Tapped(model, "q", "v")(x), torch.cat([model["q"](x), model["v"](x)], -1))
    with pytest.raises(AttributeError, match="k"):
        Tapped(model, "k")


def test_the_tap_needs_torch_alone():
    code = "import sys; sys.modules['timm'] = None; from tinymim_fast import Tapped; print(Tapped.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "Tapped", done.stderr


DDP = """
import sys
import timm, torch, torch.distributed as dist
from tinymim_fast.adapters import RelationDistillationTask

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"depth": 2, "img_size": 32, "patch_size": 8, "num_classes": 0, "num_heads": 3}
student, teacher = (timm.create_model("vit_tiny_patch16_224", embed_dim=width, **sizes) for width in (48, 96))
task = RelationDistillationTask(student, teacher)
images = torch.randn(4, 3, 32, 32)
task(images)["loss"].backward()
whole = {name: p.grad.clone() for name, p in task.get_trainable_module().named_parameters()}
student.zero_grad()
task.compile(backend="aot_eager", fullgraph=True)
task.prepare_distributed()
for _ in range(2):  # without find_unused_parameters, a second step shows what had no gradient in the first
    student.zero_grad()
    task(images[2 * dist.get_rank() :][:2])["loss"].backward()
for name, p in task.get_trainable_module().module._orig_mod.named_parameters():
    torch.testing.assert_close(p.grad, whole[name], msg=name)
dist.destroy_process_group()
"""


def test_the_task_on_two_ranks_has_the_gradient_of_the_whole_batch(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    torchrun = Path(sys.executable).parent / "torchrun"
    code, output = run_training(torchrun, "--standalone", "--nproc-per-node=2", script)
    assert code == 0, output
