"""The frozen teacher as a CUDA graph: on a CPU by a stand-in for graphs, on a GPU by CUDA's own."""

import contextlib

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("deepspeed")

from support.programs import distill_flags
from support.runs import distil, losses, pretrain_flags, pretrain_mae
from tinymim_fast.errors import InputError
from tinymim_fast.models.taps import Place, Taps
from tinymim_fast.tasks import distill
from tinymim_fast.training import cuda_graphs
from tinymim_fast.training.cuda_graphs import Graphed, capture_frozen
from tinymim_fast.training.task import Frozen


class StandIn(TorchDispatchMode):
    """Records operators with their tensors; a replay computes them anew into the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.recorded = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.recorded.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, results in self.recorded:
            if not function.is_view:
                for place, result in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs))):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != result.data_ptr():
                        place.copy_(result)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    """In place of CUDA's graphs and streams."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())


def teacher(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, patch_size=8, num_classes=0)
    return Taps(model, [Place("qkv", 3), Place("attention", 2)]).eval().requires_grad_(False).to(device, dtype)


def assert_replayed(module, device, dtype=torch.float32):
    """On fresh images bitwise what the model gives without a graph; other shapes and dtypes run without one."""
    eager = module.forward
    with torch.no_grad():
        graphed = Graphed(eager, torch.zeros(4, 3, 32, 32, device=device, dtype=dtype))
        results = []
        for seed in range(3):
            generator = torch.Generator(device).manual_seed(seed)
            images = torch.randn(4, 3, 32, 32, device=device, generator=generator).to(dtype)
            got, want = graphed(images), eager(images)
            assert list(got) == list(want) and all(torch.equal(got[place], want[place]) for place in want)
            results.append([z.data_ptr() for z in got.values()])
        assert results[0] == results[1] == results[2], "the results lie where they lay"
        few = torch.randn(2, 3, 32, 32, device=device, generator=generator).to(dtype)
        assert all(torch.equal(z, eager(few)[place]) for place, z in graphed(few).items())
    return graphed


@pytest.mark.usefixtures("stand_in")
def test_a_replay_gives_what_the_model_gives():
    graphed = assert_replayed(teacher(), "cpu")
    called = []
    graphed._forward = lambda images: called.append(images.dtype)
    graphed(torch.zeros(4, 3, 32, 32))
    graphed(torch.zeros(4, 3, 32, 32, dtype=torch.float64))
    assert called == [torch.float64]


@pytest.mark.usefixtures("stand_in")
def test_a_run_with_a_captured_teacher_learns_the_same(world, image_folder, teacher_file, tmp_path):
    """Two micro-batches a step: the second one's teacher writes over what the first one's student has read."""
    replays = []

    def build_task(config, *args):
        task = distill.build_task(config, *args)
        if config.output_dir.endswith("graphed"):
            graphed = Graphed(task.frozen.module.forward, torch.zeros(8, 3, 32, 32, dtype=task.frozen.dtype))
            task.frozen.module.forward = lambda images: replays.append(images.shape) or graphed(images)
        return task

    for name in ("eager", "graphed"):
        flags = distill_flags(image_folder, teacher_file, tmp_path / name, gradient_accumulation_steps=2, epochs=2)
        distil(world, *flags, build_task=build_task)
    assert losses(tmp_path / "graphed") == losses(tmp_path / "eager") and len(set(losses(tmp_path / "eager"))) > 1
    assert len(replays) == 2 * len(losses(tmp_path / "eager")) and set(replays) == {(8, 3, 32, 32)}


def test_asked_for_without_a_gpu_is_one_line_and_nothing_is_written(world, image_folder, teacher_file, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which can")
    message = "--cuda-graphs: got true, which needs a CUDA device, and this is cpu"
    with pytest.raises(InputError, match=message):
        distil(world, *distill_flags(image_folder, teacher_file, tmp_path / "run", cuda_graphs="true"))
    with pytest.raises(InputError, match=message):
        pretrain_mae(world, *pretrain_flags(image_folder, tmp_path / "run", cuda_graphs="true"))
    assert not (tmp_path / "run").exists()


def test_what_cant_be_captured_names_the_settings(monkeypatch):
    """And auto captures nothing, as long as no GPU has shown it to be faster."""

    def refuse(forward, images):
        raise RuntimeError("operation not permitted when stream is capturing\nand a long explanation")

    monkeypatch.setattr(cuda_graphs, "Graphed", refuse)
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **kwargs: torch.empty(*args, **kwargs))
    frozen = Frozen(nn.Identity(), torch.bfloat16, {"teacher_precision": "fp8", "attention": "flash"})
    cuda = torch.device("cuda", 0)
    with pytest.raises(InputError) as refused:
        capture_frozen(True, frozen, cuda, (2, 3, 32, 32))
    message = str(refused.value)
    assert "\n" not in message and message.startswith("cuda_graphs: got true, but the frozen model can't be captured")
    assert "with teacher_precision fp8, attention flash: operation not permitted" in message
    with pytest.raises(InputError, match="this kind of training has no frozen model"):
        capture_frozen(True, None, cuda, (2, 3, 32, 32))
    drawing = Frozen(nn.Identity(), torch.bfloat16, {}, "teacher_drop_path draws")
    with pytest.raises(InputError, match="but teacher_drop_path draws anew at each call; want false"):
        capture_frozen(True, drawing, cuda, (2, 3, 32, 32))
    for choice in ("auto", False):
        capture_frozen(choice, frozen, cuda, (2, 3, 32, 32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_teacher_is_the_eager_one_on_a_gpu(dtype, compiled):
    from tinymim_fast.training.compilation import Compiler

    module = teacher("cuda", dtype)
    with Compiler() as compiler:
        if compiled:
            compiler.compile(list(module.model.blocks[:1]))
        assert_replayed(module, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_learns_the_same_with_a_graph(world, image_folder, teacher_file, tmp_path):
    for name in ("false", "true"):
        changes = {"cuda_graphs": name, "gradient_accumulation_steps": 2, "epochs": 2}
        distil(world, *distill_flags(image_folder, teacher_file, tmp_path / name, **changes))
    assert losses(tmp_path / "true") == losses(tmp_path / "false")
