"""The simulation of an SM: on traces short enough to count by hand."""

import pytest

import latency
import sass
import sm_model
from sass import Instruction

# Two instructions as cuobjdump prints them: a load that sets scoreboard 0, and an addition that waits for it.
SASS = """
        /*0040*/                   LDS.128 R4, [R2] ;                        /* 0x0000000002047984 */
                                                                             /* 0x000e220000000c00 */
        /*0050*/              @!P0 FADD R3, R4, R3 ;                         /* 0x0000000304038221 */
                                                                             /* 0x001fc80000000000 */
        /*0060*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], !UPT ; /* 0x01e00000081879f0 */
                                                                             /* 0x000fe2000c7018ff */
"""


def test_control_bits():
    load, add, product = sass.parsed(SASS.splitlines())
    assert (load.opcode, load.stall, load.write_barrier, load.read_barrier, load.waits) == ("LDS.128", 1, 0, None, ())
    assert (add.predicate, add.stall, add.waits, add.write_barrier) == ("@!P0", 4, (0,), None)
    assert product.opcode == "HGMMA.64x256x16.F32.BF16" and product.operation == "HGMMA"


def clocks(*instructions, num_warps=1, slots=1, num_blocks=1):
    """Until the last block of programs that run the instructions one after another."""
    code = [Instruction(16 * i, "", *instruction) for i, instruction in enumerate(instructions)]
    simulation = latency.Simulation(code, list(range(len(code))), num_warps, slots, num_blocks)
    return max(simulation.run().ends)


ADD = ("FADD", "R0, R0, R1", 4)
END = ("EXIT", "", 1)


def test_one_warp_waits_for_its_stall_counts():
    assert clocks(*[ADD] * 10, END) == 40


def test_four_warps_have_sub_cores_of_their_own_and_the_fifth_shares_one():
    assert clocks(*[ADD] * 10, END, num_warps=4) == 40
    assert clocks(*[("FADD", "", 1)] * 10, END, num_warps=4) == 10
    assert clocks(*[("FADD", "", 1)] * 10, END, num_warps=8) == 21  # two warps a sub-core: one issue a clock
    assert clocks(*[ADD] * 10, END, num_warps=8) == 41  # stalls of one are filled by the other


def test_exponentials_go_through_a_quarter_as_wide_unit():
    exponential = ("MUFU.EX2", "R0, R0", 1)
    assert clocks(*[exponential] * 10, END) == 73
    assert clocks(*[exponential] * 10, END, num_warps=8) >= 20 * 8 - 8


def test_a_scoreboard_holds_until_the_result_is_there():
    load = ("LDS", "R4, [R2]", 1, (), 0)
    waits = clocks(load, ("FADD", "R0, R4, R4", 4, (0,)), END)
    assert sm_model.MIDDLE.shared_load <= waits <= sm_model.MIDDLE.shared_load + 8
    assert clocks(load, ADD, END) == 5  # nobody waits


def test_a_barrier_waits_for_the_last_warp():
    late = clocks(*[("MUFU.EX2", "", 1)] * 4, ("BAR.SYNC.DEFER_BLOCKING", " 0x0", 1), END, num_warps=8)
    # The eighth exponential of a sub-core issues after 56 clocks, its warp's barrier one later.
    assert late == 58 + sm_model.MIDDLE.barrier  # two exits on a sub-core


def test_products_wait_for_all_four_warps_and_for_one_another():
    product = ("HGMMA.64x256x16.F32.BF16", " R24, gdesc[UR8], R24, gsb0", 1)
    wait = ("WARPGROUP.DEPBAR.LE", " gsb0, 0x0", 1)
    model = sm_model.MIDDLE
    one = clocks(product, wait, END, num_warps=4)
    assert one == model.wgmma_start + 128 + model.wgmma_end
    assert clocks(product, product, wait, END, num_warps=4) == one + 128
    # The first of two groups alone: the second runs on.
    assert clocks(product, product, ("WARPGROUP.DEPBAR.LE", " gsb0, 0x1", 1), END, num_warps=4) == one
    # Two warpgroups share the matrix unit.
    assert clocks(product, wait, END, num_warps=8) == one + 128


def test_a_second_block_fills_the_waits_of_the_first():
    program = [("MUFU.EX2", "R0, R0", 1, (), 0), ("FADD", "R0, R0, R0", 4, (0,))] * 200 + [END]
    code = [Instruction(16 * i, "", *instruction) for i, instruction in enumerate(program)]
    alone, shared = (latency.clocks_per_block(code, list(range(len(code))), 4, slots) for slots in (1, 2))
    assert 0.45 * alone < shared < 0.6 * alone


def test_a_block_that_sleeps_first_begins_later():
    """A NANOSLEEP off the simulated path is of the second block on an SM."""
    program = [("BRA", " 0x20", 1), ("NANOSLEEP", " 0x3e8", 1), *[ADD] * 10, END]
    code = [Instruction(16 * i, "", *instruction) for i, instruction in enumerate(program)]
    trace = [0, *range(2, len(code))]
    asleep, awake = (
        latency.Simulation(those, trace, 4, 2, 2).run().ends for those in (code, [code[0], *[code[2]] * 2, *code[3:]])
    )
    assert asleep[0] == awake[0] and asleep[1] - awake[1] == 1750  # 1,000 ns


def test_the_loop_over_tiles_is_found_inside_another():
    exponential, jump = ("MUFU.EX2", "R0, R0"), lambda where: ("BRA", f" {16 * where:#x}")
    program = [
        ("", *ADD[:2]),
        ("@P0", "EXIT", ""),  # nothing to do
        ("", *ADD[:2]),  # the loop over maps
        ("@P1", *jump(7)),
        ("", *exponential),  # the loop over tiles
        ("", *ADD[:2]),
        ("@P2", *jump(4)),
        ("@P3", "EXIT", ""),
        ("", *jump(2)),
    ]
    code = [Instruction(16 * i, predicate, *rest) for i, (predicate, *rest) in enumerate(program)]
    assert sass.executed(code, 3) == [0, 1, 2, 3, *[4, 5, 6] * 3, 7]
    assert sass.executed(code, 3, skip_loop=True) == [0, 1]


def test_spills_are_slower_in_l2():
    spill = [("LDL", "R4, [R1]", 1, (), 0), ("FADD", "R0, R4, R4", 4, (0,))]
    code = [Instruction(16 * i, "", *instruction) for i, instruction in enumerate([*spill * 5, END])]
    times = [
        latency.clocks_per_block(code, list(range(len(code))), 4, 1, spills_in_l2=in_l2) for in_l2 in (False, True)
    ]
    assert times[1] - times[0] == 5 * (sm_model.MIDDLE.l2 - sm_model.MIDDLE.l1)


def test_what_is_not_modelled_is_refused():
    with pytest.raises(sm_model.NotModelled, match="UTMALDG"):
        clocks(("UTMALDG.2D", "", 1), END)


def test_the_last_round_counts_whole():
    gpu = sm_model.Gpu(num_sms=10, mhz=1000, limits=(0, 0, 0))
    assert latency.microseconds(500, 40, 2, gpu) == 2.0
    assert latency.microseconds(500, 41, 2, gpu) == 3.0
