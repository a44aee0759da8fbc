import math

import numpy as np
import pytest
import torch

from tinymim_fast.errors import InputError
from tinymim_fast.kernels import relation_kl
from tinymim_fast.models.preprocessing import Preprocessing
from tinymim_fast.models.vit import create_vit
from tinymim_fast.relation_maps import Compared, Viewed, compare, head_kl, relation_rows, telling_queries
from tinymim_fast.relation_picture import draw, lines_of

PIL = pytest.importorskip("PIL.Image")


def packed(width, seed, tokens=5):
    return torch.randn(2, tokens, 3 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("relation", ["qk", "vv", "qq", "kk"])
def test_rows_are_the_formula_written_out(relation):
    """With loops, from the channels of each head."""
    width, heads = 12, 3
    qkv, size = packed(width, 0), width // heads
    rows = relation_rows(qkv, relation, heads)
    starts = [width * "qkv".index(letter) for letter in relation]
    for b, h in np.ndindex(2, heads):
        x, y = (qkv[b, :, start + h * size : start + (h + 1) * size].tolist() for start in starts)
        for i, query in enumerate(x):
            weights = [math.exp(sum(p * q for p, q in zip(query, key)) / math.sqrt(size)) for key in y]
            want = [w / sum(weights) for w in weights]
            assert rows[b, h, i].tolist() == pytest.approx(want, rel=1e-12)


def test_half_precision_gives_fp32_rows():
    rows = relation_rows(packed(12, 0).bfloat16(), "qk", 3)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3, 5))


def test_head_kl_is_the_loss_a_head():
    qkv_t, qkv_s = packed(24, 1), packed(12, 2)
    split = [q.unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4) for q in (qkv_t, qkv_s)]
    (q_t, k_t, _), (q_s, k_s, _) = split
    want = relation_kl(q_s, k_s, q_t, k_t, backend="reference", reduction="none").mean(-1)
    ours = head_kl(relation_rows(qkv_t, "qk", 3), relation_rows(qkv_s, "qk", 3))
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)


def test_head_kl_is_finite_where_a_probability_underflows():
    one_sided = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    assert head_kl(one_sided, one_sided) == 0
    assert head_kl(one_sided, one_sided.flip(-1)).isfinite()


def test_queries_are_the_rows_that_differ_most():
    rows = torch.full((6, 6), 1 / 6)
    rows[4], rows[2] = torch.eye(6)[0], torch.tensor([0, 0.6, 0.4, 0, 0, 0])
    assert telling_queries(rows, 2) == [4, 2]
    assert sorted(telling_queries(rows, 6)) == list(range(6))


def of_models(students, tokens=12, heads=2):
    """Made-up relations of a teacher and students on one image, two relations."""
    models = ("teacher", *students)
    rng = np.random.default_rng(0)
    rows = {
        relation: {m: torch.from_numpy(rng.dirichlet(np.ones(tokens), size=(heads, tokens))) for m in models}
        for relation in ("qk", "vv")
    }
    kl = {relation: {m: torch.tensor([0.25, 0.75]) for m in students} for relation in rows}
    return Compared(image=np.zeros((30, 40, 3), dtype=np.uint8), rows=rows, kl=kl)


@pytest.mark.parametrize("students", [(), ("one",), ("one", "two")], ids=len)
def test_the_picture_is_whole_or_not_there(tmp_path, students):
    lines = [*lines_of(of_models(students), [0, 11], [1]), *lines_of(of_models(students), [5])]
    draw(tmp_path / "maps.png", lines, (3, 4), title="a title")
    with PIL.open(tmp_path / "maps.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    with pytest.raises(ValueError):
        draw(tmp_path / "bad.png", lines, (3, 5), title="another grid")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]


def test_a_line_is_one_head_or_their_mean():
    of = of_models(["one"])
    mean, first, second = lines_of(of, [3], [0, 1])
    np.testing.assert_allclose(mean.row("qk", "one"), (first.row("qk", "one") + second.row("qk", "one")) / 2)
    np.testing.assert_array_equal(second.row("vv", "teacher"), of.rows["vv"]["teacher"][1, 3])
    assert [line.kl("qk", "one") for line in (mean, first, second)] == [0.5, 0.25, 0.75]
    assert first.kl("qk", "teacher") is None and first.continues(mean)
    assert (
        mean.label((3, 4), first=True) == "query 1,4\nmean over heads" and second.label((3, 4), first=False) == "head 2"
    )


def viewed(title, width, mean=(0.5, 0.4, 0.3), **kwargs):
    torch.manual_seed(width)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_heads": 3, **kwargs}
    vit = create_vit("vit_tiny_patch16_224", embed_dim=width, **sizes)
    return Viewed(title=title, vit=vit, block=2, expects=Preprocessing(mean=mean))


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return PIL.fromarray(pixels).resize((224, 224), PIL.NEAREST)


def test_compare_is_the_formula_on_each_models_own_images(picture):
    """Against hooks of this test's own, each model with its mean: KL over all tokens, rows of the patches."""
    teacher, student = viewed("teacher", 48), viewed("one", 24, mean=(0.1, 0.2, 0.3))
    compared = compare(picture, teacher, [student], ["qk", "vv"], 3)
    qkv = {}
    for model in (teacher, student):
        pixels = np.asarray(picture.resize((32, 32), PIL.BICUBIC)) / 255
        images = (torch.from_numpy(pixels).float() - torch.tensor(model.expects.mean)) / torch.tensor(model.expects.std)
        model.vit.blocks[1].attn.qkv.register_forward_hook(
            lambda m, a, out, title=model.title: qkv.update({title: out})
        )
        model.vit(images.permute(2, 0, 1)[None])
    for relation in ("qk", "vv"):
        rows = {title: relation_rows(z, relation, 3) for title, z in qkv.items()}
        torch.testing.assert_close(compared.kl[relation]["one"], head_kl(rows["teacher"], rows["one"])[0])
        for title, found in rows.items():
            torch.testing.assert_close(compared.rows[relation][title], found[0, :, 1:, 1:])


def test_other_prefixes_are_compared_on_the_patches_alone(picture):
    teacher, student = viewed("teacher", 48, reg_tokens=4), viewed("one", 24)
    compared = compare(picture, teacher, [student], ["vv"], 3)
    for rows in compared.rows["vv"].values():
        assert rows.shape == (3, 16, 16)
        torch.testing.assert_close(rows.sum(-1), torch.ones(3, 16))


@pytest.mark.parametrize(
    ("student", "heads", "message"),
    [
        (("one", 24), 5, "heads: got 5, want a number that divides teacher's width 48"),
        (("one", 40), 3, "heads: got 3, want a number that divides one's width 40"),
        (("one", 24, (0.5,) * 3), 3, "one has 2 x 2 patches, and teacher has 4 x 4 patches; want one grid"),
    ],
    ids=["heads", "width", "grid"],
)
def test_models_that_cant_be_laid_side_by_side(picture, student, heads, message):
    kwargs = {"num_heads": 4} if student[1] == 40 else {"patch_size": 16} if len(student) == 3 else {}
    with pytest.raises(InputError) as refusal:
        compare(picture, viewed("teacher", 48), [viewed(*student, **kwargs)], ["qk"], heads)
    assert str(refusal.value) == message
