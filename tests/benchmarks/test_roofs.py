"""The formulas of the roofs against numbers worked out by hand."""

import pytest

import roofs

# One relation at B=256, H=12, N=197, D_t=64, bf16 on 4.3 TB/s, 790 TFLOP/s and 132 SMs at 1.75 GHz, in microseconds:
# D_s: (bytes of QK, bytes of VV, matrix unit, floor of QK + VV).
BY_HAND_US = {16: (54, 27, 34, 129), 32: (72, 36, 48, 137), 64: (108, 54, 77, 185)}


def vit_shape(head_dim_s):
    return roofs.Shape(batch_size=256, num_heads=12, num_tokens=197, head_dim_s=head_dim_s, head_dim_t=64, itemsize=2)


@pytest.mark.parametrize("head_dim_s", BY_HAND_US)
def test_floors_as_by_hand(head_dim_s):
    shape = vit_shape(head_dim_s)
    qk, vv = (
        roofs.times_ms(roofs.work(relation, shape, backward=True), roofs.H200_UNDER_LOAD) for relation in ("qk", "vv")
    )
    floor = roofs.floor_ms(["qk", "vv"], shape, roofs.H200_UNDER_LOAD, backward=True)
    figures = qk["bytes"], vv["bytes"], qk["matrix unit"], floor
    assert [round(1e3 * figure) for figure in figures] == list(BY_HAND_US[head_dim_s])
    assert vv["matrix unit"] == qk["matrix unit"]
    assert round(1e3 * qk["exponentials"], 1) == 64.5
    assert round(1e3 * qk["instructions"], 1) == 62.9


def test_smallest_case_counted():
    shape = roofs.Shape(batch_size=1, num_heads=1, num_tokens=2, head_dim_s=3, head_dim_t=5, itemsize=4)
    # Read x_s, y_s (2 x 3 each), x_t, y_t (2 x 5 each), write dX and dY (2 x 3 each): 44 numbers of 4 bytes.
    # x_s y_s^T: 2*2*3 products and sums, x_t y_t^T: 2*2*5, dX and dY: 2*2*3 each.
    qk = roofs.work("qk", shape, backward=True)
    assert (qk.num_bytes, qk.flop, qk.exps) == (176, 2 * (12 + 20 + 12 + 12), 8)
    forward = roofs.work("vv", shape, backward=False)
    assert (forward.num_bytes, forward.flop, forward.exps) == (64, 2 * (12 + 20), 8)
    both = roofs.total(["qk", "vv"], shape, backward=True)
    assert (both.num_bytes, both.flop, both.exps) == (176 + 88, 2 * 112, 16)


def test_unknown_clock_leaves_roofs_out():
    rates = roofs.Rates.of(gb_per_s=1000, tflop_per_s=100, num_sms=10, clock_mhz=None)
    times = roofs.times_ms(roofs.work("qk", vit_shape(16), backward=True), rates)
    assert times["exponentials"] == times["instructions"] == 0
    assert times["bytes"] > 0
