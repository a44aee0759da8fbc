"""Each target against its formula in fp64, on what hooks see in timm's own forward."""

import functools
import itertools

import pytest
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.models.masking import gather_tokens
from tinymim_fast.models.taps import Taps
from tinymim_fast.models.vit import create_vit
from tinymim_fast.targets.distiller import Distiller, build_target
from tinymim_fast.targets.settings import read_targets
from tinymim_fast.targets.target import complete_blocks

NAME = "vit_tiny_patch16_224"
STUDENT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
TEACHER = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 6, "num_classes": 5}


def vit(**kwargs):
    model = create_vit(NAME, img_size=32, **kwargs).double().eval()
    for parameter in model.parameters():  # LayerNorms and biases that say something
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return vit(**STUDENT), vit(**TEACHER)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()


def build(models, *recipe, num_visible=None):
    student, teacher = models
    targets = []
    for settings in read_targets(list(recipe), "targets"):
        if hasattr(settings, "teacher_block"):
            settings = complete_blocks(settings, student, teacher, 4)
        targets.append(build_target(settings, student, teacher, backend="auto").double())
    return Distiller(student, targets, num_visible=num_visible)


def run(models, images, *recipe, order=None, num_visible=None):
    """The distiller and its losses, the teacher's tensors taken at the visible patches."""
    distiller = build(models, *recipe, num_visible=num_visible)
    given = list(Taps(models[1], distiller.places_t)(images[0]).values()) if distiller.places_t else []
    given = [z.detach() for z in given]
    if order is not None:
        given = [gather_tokens(z, order[:, :num_visible], 1) if z.ndim == 3 else z for z in given] + [order]
    return distiller, distiller(images[1], *given)


class Seen:
    """What timm's forward computes, by hooks on its modules."""

    def __init__(self, model, images):
        self.of, handles = {}, []
        for name, module in model.named_modules():
            hook = functools.partial(self.note, name)
            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()

    def note(self, name, module, inputs, out):
        self.of[name] = inputs[0], out

    def output(self, name):
        return self.of[name][1]

    def input(self, name):
        return self.of[name][0]


def heads_of(qkv, letter, heads):
    part = qkv.chunk(3, -1)["qkv".index(letter)]
    return part.reshape(*part.shape[:2], heads, -1).transpose(1, 2)


def kl(log_t, log_s):
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def relation(qkv_s, qkv_t, name, heads, softmax=True):
    products = []
    for qkv in (qkv_s, qkv_t):
        x, y = (heads_of(qkv, letter, heads) for letter in name)
        products.append(x @ y.mT * x.shape[-1] ** -0.5)
    if not softmax:
        return ((products[0] - products[1]) ** 2).mean()
    return kl(torch.log_softmax(products[1], -1), torch.log_softmax(products[0], -1))


ONE_PAIR = {"teacher_block": 2, "student_block": 1}
TWO_PAIRS = {"teacher_block": [1, 4], "student_block": [2, 3]}
NINE = ["".join(pair) for pair in itertools.product("qkv", repeat=2)]


@pytest.mark.parametrize(
    ("told", "pairs", "names", "heads", "softmax"),
    [
        ({"relations": ["qk", "vv"], "heads": 6}, [(3, 4)], ["qk", "vv"], 6, True),
        ({"relations": ["qq", "kk"], "heads": 2, **ONE_PAIR}, [(1, 2)], ["qq", "kk"], 2, True),
        ({"relations": ["vv"], "heads": 3, **TWO_PAIRS}, [(2, 1), (3, 4)], ["vv"], 3, True),
        ({"relations": ["kv", "qk"], "heads": 3, "teacher_block": [2, 3]}, [(3, 2), (3, 3)], ["kv", "qk"], 3, True),
        ({"relations": "all", "heads": 12}, [(3, 4)], NINE, 12, True),
        ({"relations": ["qq", "kk", "vv"], "heads": 6, "softmax": False}, [(3, 4)], ["qq", "kk", "vv"], 6, False),
        ({"relations": ["qk", "vq"], "heads": 1, "softmax": False}, [(3, 4)], ["qk", "vq"], 1, False),
    ],
    ids=str,
)  # fmt: skip
def test_relations(models, images, told, pairs, names, heads, softmax):
    _, losses = run(models, images, {"kind": "relations", **told})
    teacher, student = Seen(models[1], images[0]), Seen(models[0], images[1])
    qkv = [(student.output(f"blocks.{s - 1}.attn.qkv"), teacher.output(f"blocks.{t - 1}.attn.qkv")) for s, t in pairs]
    want = {name: sum(relation(*pair, name, heads, softmax) for pair in qkv) / len(pairs) for name in names}
    total = sum(want.values()) / (9 if told["relations"] == "all" else 1)
    torch.testing.assert_close(losses["loss"], total, rtol=1e-10, atol=0)
    if len(names) > 1:
        for name in names:
            torch.testing.assert_close(losses[f"relations/{name}"], want[name], rtol=1e-10, atol=0)


PLACES = {  # what of timm's forward is at the place of block 2
    "block_output": lambda seen: seen.output("blocks.1"),
    "mlp": lambda seen: seen.output("blocks.1.ls2"),
    "attention": lambda seen: seen.output("blocks.1.ls1"),
    "norm1": lambda seen: seen.output("blocks.1.norm1"),
    "q": lambda seen: seen.output("blocks.1.attn.qkv").chunk(3, -1)[0],
    "k": lambda seen: seen.output("blocks.1.attn.qkv").chunk(3, -1)[1],
    "v": lambda seen: seen.output("blocks.1.attn.qkv").chunk(3, -1)[2],
    "final_norm": lambda seen: seen.output("norm"),
    "mlp, after": lambda seen: seen.output("blocks.1"),
    "attention, after": lambda seen: seen.input("blocks.1.norm2"),
}


def smooth_l1(found, target, beta):
    """Written out; the target normalised over channels."""
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gap = (found - target).abs()
    return torch.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2).mean()


@pytest.mark.parametrize("place", PLACES)
def test_features(models, images, place):
    name, _, after = place.partition(", ")
    recipe = {"kind": "features", "place": name, "after_residual": bool(after), "beta": 0.7}
    distiller, losses = run(models, images, {**recipe, "teacher_block": 2, "student_block": 2})
    teacher, student = Seen(models[1], images[0]), Seen(models[0], images[1])
    (layer,) = distiller.targets["features"].projections
    want = smooth_l1(layer(PLACES[place](student)), PLACES[place](teacher), 0.7)
    torch.testing.assert_close(losses["features"], want, rtol=1e-10, atol=0)


def test_features_of_a_whole_projection_and_of_several_blocks(models, images):
    recipe = {"kind": "features", "place": "qkv", "teacher_block": [1, 4], "student_block": [2, 3], "weight": 0.25}
    distiller, losses = run(models, images, recipe)
    teacher, student = Seen(models[1], images[0]), Seen(models[0], images[1])
    layers = list(distiller.targets["features"].projections)
    assert len(layers) == 6
    want = 0.0
    for (s, t), of_pair in zip([(2, 1), (3, 4)], (layers[:3], layers[3:])):
        parts_s = student.output(f"blocks.{s - 1}.attn.qkv").chunk(3, -1)
        parts_t = teacher.output(f"blocks.{t - 1}.attn.qkv").chunk(3, -1)
        want = want + sum(smooth_l1(layer(a), b, 2.0) for layer, a, b in zip(of_pair, parts_s, parts_t)) / 6
    torch.testing.assert_close(losses["features"], want, rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss"], want / 4, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("place", "projection"), [("final_norm", True), ("block_output", False)])
def test_local_relations(models, images, place, projection):
    recipe = {"kind": "local", "place": place, "projection": projection, "temperature": 0.11}
    distiller, losses = run(models, images, {**recipe, "teacher_block": 2, "student_block": 2})
    logs = []
    for model, views in zip(models, images[::-1]):
        f = PLACES[place](Seen(model, views))[:, 1:]
        if projection and model is models[0]:
            f = distiller.targets["local"].projections[0](f)
        f = f / f.norm(dim=-1, keepdim=True)
        logs.append(torch.log_softmax(f @ f.mT / 0.11, -1))
    torch.testing.assert_close(losses["local"], kl(logs[1], logs[0]), rtol=1e-10, atol=0)


def test_class_token_and_logits(models, images):
    distiller, losses = run(models, images, {"kind": "class_token"}, {"kind": "logits", "temperature": 3.0})
    teacher, student = Seen(models[1], images[0]), Seen(models[0], images[1])
    token_s, token_t = student.output("norm")[:, 0], teacher.output("norm")[:, 0]
    want = smooth_l1(distiller.targets["class_token"].projection(token_s), token_t, 2.0)
    torch.testing.assert_close(losses["class_token"], want, rtol=1e-10, atol=0)
    log_s, log_t = (
        torch.log_softmax(z / 3.0, -1)
        for z in (distiller.targets["logits"].projection(token_s), teacher.output("head"))
    )
    torch.testing.assert_close(losses["logits"], 9 * kl(log_t, log_s), rtol=1e-10, atol=0)
    torch.testing.assert_close(losses["loss"], losses["class_token"] + losses["logits"], rtol=1e-12, atol=0)


PIXELS = {"kind": "pixels", "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def test_masked_input_and_pixels(models, images):
    """The student computed on the visible tokens alone, everything compared there; pixels where it saw nothing."""
    order = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)).argsort(1)
    recipe = [{"kind": "relations", "heads": 6}, {"kind": "features", "place": "block_output"}, PIXELS]
    distiller, losses = run(models, images, *recipe, order=order, num_visible=5)
    student, teacher = models[0], Seen(models[1], images[0])

    x = student.patch_embed(images[1]) + student.pos_embed[:, 1:]
    x = torch.stack([x[b, order[b, :5]] for b in range(2)])
    x = torch.cat([(student.cls_token + student.pos_embed[:, :1]).expand(2, -1, -1), x], 1)
    for block in student.blocks[:2]:
        x = block(x)
    qkv_s = student.blocks[2].attn.qkv(student.blocks[2].norm1(x))
    output = student.blocks[2](x)

    def seen(tokens):
        return torch.stack([torch.cat([tokens[b, :1], tokens[b, 1:][order[b, :5]]]) for b in range(2)])

    qkv_t = seen(teacher.output("blocks.3.attn.qkv"))
    want = relation(qkv_s, qkv_t, "qk", 6) + relation(qkv_s, qkv_t, "vv", 6)
    torch.testing.assert_close(losses["relations"], want, rtol=1e-10, atol=0)
    (layer,) = distiller.targets["features"].projections
    want = smooth_l1(layer(output), seen(teacher.output("blocks.3")), 2.0)
    torch.testing.assert_close(losses["features"], want, rtol=1e-10, atol=0)

    decoder = distiller.targets["pixels"].decoder
    predicted = decoder.decode(student.norm(output), order.argsort(1))
    errors = []
    for b in range(2):
        for patch in order[b, 5:].tolist():
            row, column = divmod(patch, 4)
            pixels = images[1][b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            errors.append(((predicted[b, patch] - target) ** 2).mean())
    torch.testing.assert_close(losses["pixels"].double(), torch.stack(errors).mean(), rtol=1e-6, atol=0)


EVERY_KIND = [
    {"kind": "relations", "relations": "all", "heads": 6},
    {"kind": "features", "place": "attention", "teacher_block": 2, "student_block": 1},
    {"kind": "local"},
    {"kind": "class_token"},
    {"kind": "logits"},
    PIXELS,
]


def test_every_trained_weight_gets_a_gradient(models, images):
    order = torch.rand(2, 16).argsort(1)
    distiller, losses = run(models, images, *EVERY_KIND, order=order, num_visible=6)
    assert distiller.parts == tuple(losses)
    losses["loss"].backward()
    untouched = [n for n, p in distiller.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert untouched == []
    for model in models:
        model.zero_grad()


@pytest.mark.parametrize(
    ("recipe", "student", "teacher", "message"),
    [
        ({"kind": "relations", "heads": 5}, {}, {}, "heads: got 5, want a number that divides the student's width 24"),
        ({"kind": "relations", "heads": 3}, {"reg_tokens": 2}, {}, "model_kwargs: the student has 19 tokens, 3"),
        ({"kind": "relations", "teacher_block": 5}, {}, {}, "teacher_block: got 5, want 1 to 4"),
        ({"kind": "features", **TWO_PAIRS, "student_block": [1, 9]}, {}, {}, "student_block: got 9, want 1 to 3"),
        ({"kind": "features", "place": "final_norm"}, {}, {"class_token": False}, "place: the teacher has no norm"),
        ({"kind": "local"}, {"patch_size": 16}, {}, "model_kwargs: the student has 4 patches, the teacher 16; match"),
        ({"kind": "class_token"}, {"class_token": False}, {}, "kind: the student has no class token"),
        ({"kind": "logits"}, {}, {"num_classes": 0}, "kind: the teacher has no classifier"),
    ],
    ids=str,
)  # fmt: skip
def test_models_that_a_target_does_not_fit(recipe, student, teacher, message):
    models = create_vit(NAME, img_size=32, **STUDENT | student), create_vit(NAME, img_size=32, **TEACHER | teacher)
    with pytest.raises(InputError, match=message):
        build(models, recipe)


@pytest.mark.parametrize("name", ["keys", "training"])
def test_a_name_that_pytorch_uses_itself(models, name):
    with pytest.raises(InputError, match=f"name: got {name}, which PyTorch uses itself"):
        build(models, {"kind": "class_token", "name": name})
