import math

import numpy as np
import pytest
import torch

from tinymim_fast.kernels import relation_kl
from tinymim_fast.relation_maps import draw_relation_maps, head_kl, relation_rows, telling_queries

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


def test_the_picture_is_whole_or_not_there(tmp_path):
    rows = np.random.default_rng(0).dirichlet(np.ones(12), size=2)
    image = np.zeros((30, 40, 3), dtype=np.uint8)
    maps = {"Q K": {"teacher": rows, "student": rows[::-1]}, "V V": {"teacher": rows}}
    draw_relation_maps(tmp_path / "maps.png", image, (3, 4), [0, 11], maps, title="a title")
    with PIL.open(tmp_path / "maps.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    with pytest.raises(ValueError):
        draw_relation_maps(tmp_path / "bad.png", image, (3, 5), [0, 11], maps, title="another grid")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]
