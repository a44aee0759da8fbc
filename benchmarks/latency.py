"""How long a kernel takes, simulated from its machine code: no GPU needed, and no timing.

An issue bound tells how long the schedulers are busy, nothing of waiting. Here the warps of an SM's blocks run through
their instructions clock by clock. Assumed is:

- An SM has four sub-cores; warp w of a block lives on sub-core w % 4. A sub-core issues one warp instruction a clock,
  of the warp that issued last if it can, else of the oldest. A warp issues in order, when its stall count has run out
  and the scoreboards that it waits for are released (the control bits in the machine code, see sass.py).
- A sub-core's units, in clocks a warp instruction: FMA 1, integer, logic, conversion, comparison and moves 2, integer
  multiplication 2, MUFU 8, HMMA 16x8x16 8. `Gpu` holds what differs from sm_90.
- Shared memory, shuffles, and the L1 cache, one for the SM, move 128 bytes a clock; results come a latency later.
  A global load takes the latency of memory under load, a spilled register that of L1 (or of L2, `spills_in_l2`).
- A block's barrier waits for its warps and for what they stored to shared memory, and costs a latency.
- A wgmma begins when its four warps have issued it and the matrix unit, one for the SM, is free; m64nNk16 keeps it
  busy for N/2 clocks, and for as long as its operands take out of shared memory.
- A block that ends gives its place to the next one after a pause. Simulated are a few blocks; the time of one is what
  they take, without those that fill the SM first. Two blocks an SM begin 700 clocks apart, and by as much more as the
  kernel's NANOSLEEP says (device_math.stagger). That counts: blocks close to each other stay in step, and take up to
  30 % longer than half a block of queries apart. So they do where memory latencies vary by 30 %.

Latencies are not published. Three sets stand for what is known from microbenchmarks of Hopper (Luo et al. 2024,
arXiv 2402.13499, and the like): OPTIMISTIC, MIDDLE, PESSIMISTIC. `attention_error` tells how far the simulation is from
published times of a Triton attention forward. sm_80, sm_89 and sm_100 have clocks, units and sizes of their own but
Hopper's latencies: their times rank designs for one of them, and nothing else. Not modelled: misses of the instruction
cache, bank conflicts, contention for L2 and memory, throttled clocks, TMA, mbarriers and tcgen05 (code with these is
refused).
"""

import math
import re
from collections import Counter

from sass import Instruction
from sm_model import ALU, FMA, GPUS, HMMA, IMAD, MEM, MIDDLE, NO_UNIT, XU, Gpu, Latencies, Step

STORES = ("STS", "STSM", "STL")
JUMPS = ("BRA", "BSYNC", "EXIT", "CALL", "RET")
NEVER = 1 << 60


class _Warp:
    __slots__ = (
        "block",
        "bounds",
        "copied",
        "copies",
        "drained",
        "number",
        "position",
        "products",
        "ready",
        "scoreboards",
        "since",
        "sub_core",
    )

    def __init__(self, block: "_Block", number: int, start: int) -> None:
        self.block, self.number, self.sub_core = block, number, number % 4
        self.position, self.ready, self.drained, self.copied, self.products = 0, start, 0, 0, 0
        self.scoreboards = [0] * 6
        self.copies: list[int] = []
        self.bounds: list[int] = []  # how many products there were when each group of them ended
        self.since = 0  # when it was held back


class _Block:
    __slots__ = ("barriers", "groups", "left")

    def __init__(self, num_warps: int) -> None:
        self.left = num_warps
        self.barriers: dict[str, list[tuple[_Warp, int]]] = {}
        self.groups = [_WarpGroup() for _ in range((num_warps + 3) // 4)]


class _WarpGroup:
    """Its products: how many warps issued each, when the last of them did, when it ends."""

    __slots__ = ("ends", "issued", "sums", "waiting")

    def __init__(self) -> None:
        self.issued: list[list[int]] = []
        self.ends: list[int] = []
        self.sums: dict[str, int] = {}
        self.waiting: list[tuple[_Warp, int, int]] = []


class Simulation:
    """One SM, on which blocks of `num_warps` go through `trace`; see the module for what is assumed.

    Args:
        trace: indices of instructions, in the order of their execution by each warp.
        slots: blocks that live on the SM at once; `num_blocks` follow one another.
    """

    def __init__(
        self,
        code: list[Instruction],
        trace: list[int],
        num_warps: int,
        slots: int,
        num_blocks: int,
        latencies: Latencies = MIDDLE,
        gpu: Gpu = GPUS["sm_90"],
        spills_in_l2: bool = False,
    ) -> None:
        steps = {i: Step(code[i], latencies, spills_in_l2) for i in set(trace)}
        self.steps = [steps[i] for i in trace]
        self.num_warps, self.slots, self.num_blocks, self.latencies = num_warps, slots, num_blocks, latencies
        sleeps = [int(i.operands, 16) * gpu.mhz / 1000 for i in code if i.operation == "NANOSLEEP"]
        self.sleep = round(max(sleeps, default=0))
        self.clocks = {FMA: gpu.fma, ALU: 2, IMAD: 2, XU: 8, MEM: 2, HMMA: gpu.hmma}
        self.free = [[0] * 7 for _ in range(4)]  # when each unit of a sub-core takes the next instruction
        self.shared_free = self.matrix_free = 0
        self.busy: Counter = Counter()  # clocks of units, of all sub-cores
        self.waited: Counter = Counter()  # clocks that warps waited, by the operation that did not issue
        self.sub_cores: list[list[_Warp]] = [[], [], [], []]
        self.wake = [NEVER] * 4
        self.launched = 0
        self.ends: list[int] = []

    def run(self) -> "Simulation":
        """Until all blocks have ended: `ends`, `busy` and `waited` are in clocks."""
        for slot in range(min(self.slots, self.num_blocks)):
            self._launch(700 * slot + slot % 2 * self.sleep)
        while any(self.sub_cores):
            clock = min(self.wake)
            if clock == NEVER:
                raise RuntimeError("the simulated warps wait for one another")
            for sub_core in range(4):
                if self.wake[sub_core] <= clock:
                    self.wake[sub_core] = self._issue_one(sub_core, clock)
        return self

    def _launch(self, start: int) -> None:
        block = _Block(self.num_warps)
        for number in range(self.num_warps):
            warp = _Warp(block, number, start)
            self.sub_cores[warp.sub_core].append(warp)
            self.wake[warp.sub_core] = min(self.wake[warp.sub_core], start)
        self.launched += 1

    def _issue_one(self, sub_core: int, clock: int) -> int:
        """Issues at most one instruction; when to look again. The list begins with the warp that issued last."""
        free, steps = self.free[sub_core], self.steps
        warps = self.sub_cores[sub_core]
        soonest = NEVER
        for place, warp in enumerate(warps):
            at = warp.ready
            if at <= clock:
                unit = steps[warp.position].unit
                at = max(free[IMAD], free[FMA]) if unit == IMAD else free[unit]
                if at <= clock:
                    if place:
                        warps.insert(0, warps.pop(place))
                    self._issue(warp, steps[warp.position], clock, free)
                    return clock + 1 if warps else NEVER
            if at < soonest:
                soonest = at
        return soonest

    def _issue(self, warp: _Warp, step: Step, clock: int, free: list[int]) -> None:
        latencies, unit, operation = self.latencies, step.unit, step.operation
        ready = clock + step.stall
        done, read = clock + step.latency, clock + latencies.operands_read
        if unit == NO_UNIT:
            ready, done = self._control(warp, step, clock, ready, done)
        else:
            free[unit] = clock + self.clocks[unit]
            if unit == XU:
                self.busy["mufu"] += 8
                read = clock + 8
            elif unit == MEM:
                begin = max(clock + 4, self.shared_free)
                self.shared_free = begin + step.wavefronts
                self.busy["shared"] += step.wavefronts
                read = max(begin + step.wavefronts, read)
                done = begin + step.wavefronts + step.latency - 5
                if operation in STORES:
                    warp.drained = max(warp.drained, done)
                elif operation == "LDGSTS":
                    warp.copied = max(warp.copied, done)
                    done = read
                elif operation in ("STG", "RED"):
                    done = read
        scoreboards = warp.scoreboards
        if step.write is not None and done > scoreboards[step.write]:
            scoreboards[step.write] = done
        if step.read is not None and read > scoreboards[step.read]:
            scoreboards[step.read] = read
        warp.position += 1
        if warp.position == len(self.steps):
            self._end(warp, clock)
            return
        following = self.steps[warp.position]
        if ready < NEVER:
            for i in following.waits:
                if scoreboards[i] > ready:
                    ready = scoreboards[i]
            self.waited[following.operation] += ready - clock - step.stall
        warp.ready, warp.since = ready, clock  # NEVER: a barrier or a product holds it back, and will wake it

    def _control(self, warp: _Warp, step: Step, clock: int, ready: int, done: int) -> tuple[int, int]:
        """When the warp goes on, and when the result is there, after an instruction with rules of its own."""
        latencies, operation = self.latencies, step.operation
        if operation in JUMPS:
            ready = max(ready, clock + latencies.branch)
        elif operation == "MEMBAR":
            done = max(clock + 6, warp.drained) + latencies.fence
        elif operation == "FENCE":
            done = max(clock + 2, warp.drained) + latencies.fence
        elif operation == "LDGDEPBAR":
            warp.copies.append(warp.copied)
            done = clock + 6
        elif operation == "DEPBAR" and warp.copies:
            kept = int(re.search(r"SB\d+, 0x([0-9a-f]+)", step.instruction.operands)[1], 16)
            arrived = warp.copies[: len(warp.copies) - kept]
            ready = max(ready, max(arrived, default=0))
        elif operation == "BAR":
            ready = self._barrier(warp, step.instruction, clock, ready)
        elif operation == "HGMMA":
            self._multiply(warp, step.product, clock)
        elif operation == "WARPGROUP" and "DEPBAR" in step.instruction.opcode:
            ready = self._await_products(warp, step.instruction, ready)
        return ready, done

    def _barrier(self, warp: _Warp, instruction: Instruction, clock: int, ready: int) -> int:
        """BAR.SYNC and BAR.ARV; without a count all warps of the block take part."""
        name, *count = (part.strip() for part in instruction.operands.split(","))
        expected = int(count[0], 16) // 32 if count and count[0].startswith("0x") else self.num_warps
        arrived = warp.block.barriers.setdefault(name, [])
        only_arrives = "ARV" in instruction.opcode
        arrived.append((None if only_arrives else warp, max(clock, warp.drained - 8)))
        if len(arrived) < expected:
            return ready if only_arrives else NEVER
        released = max(time for _, time in arrived) + self.latencies.barrier
        for other, _ in arrived:
            if other is not None and other is not warp:
                self._resume(other, released)
        arrived.clear()
        return ready if only_arrives else max(ready, released)

    def _resume(self, warp: _Warp, clock: int) -> None:
        """Of a warp that was held back; its next instruction's scoreboards count as well."""
        waits = self.steps[warp.position].waits
        warp.ready = max([clock, *(warp.scoreboards[i] for i in waits)])
        self.waited[self.steps[warp.position - 1].operation] += warp.ready - warp.since
        self.wake[warp.sub_core] = min(self.wake[warp.sub_core], warp.ready)

    def _multiply(self, warp: _Warp, product: tuple[int, int, str, bool], clock: int) -> None:
        group = warp.block.groups[warp.number // 4]
        busy, chained, total, ends_group = product
        k, warp.products = warp.products, warp.products + 1
        if ends_group:
            warp.bounds.append(warp.products)
        if k == len(group.issued):
            group.issued.append([0, 0])
            group.ends.append(NEVER)
        issued = group.issued[k]
        issued[0] += 1
        issued[1] = max(issued[1], clock)
        if issued[0] < min(4, self.num_warps):
            return
        begin = max(issued[1] + self.latencies.wgmma_start, self.matrix_free, group.sums.get(total, 0))
        self.matrix_free = begin + busy
        self.busy["matrix"] += busy
        group.sums[total] = begin + chained
        group.ends[k] = max(begin + busy, begin + chained, group.ends[k - 1] if k else 0)
        for waiting in list(group.waiting):
            other, needed, ready = waiting
            if group.ends[needed - 1] < NEVER:
                group.waiting.remove(waiting)
                self._resume(other, max(ready, group.ends[needed - 1] + self.latencies.wgmma_end))

    def _await_products(self, warp: _Warp, instruction: Instruction, ready: int) -> int:
        """All but the last groups of products that this warp has begun, as many as the instruction says."""
        kept = int(re.search(r"0x([0-9a-f]+)", instruction.operands)[1], 16)
        group = warp.block.groups[warp.number // 4]
        bounds = [0, *warp.bounds]
        needed = bounds[max(0, len(bounds) - 1 - kept)] if kept else warp.products
        if not needed:
            return ready
        if group.ends[needed - 1] == NEVER:
            group.waiting.append((warp, needed, ready))
            return NEVER
        return max(ready, group.ends[needed - 1] + self.latencies.wgmma_end)

    def _end(self, warp: _Warp, clock: int) -> None:
        self.sub_cores[warp.sub_core].remove(warp)
        warp.block.left -= 1
        if not warp.block.left:
            self.ends.append(clock)
            if self.launched < self.num_blocks:
                self._launch(clock + self.latencies.next_block)


def clocks_per_block(
    code: list[Instruction],
    trace: list[int],
    num_warps: int,
    slots: int,
    latencies: Latencies = MIDDLE,
    gpu: Gpu = GPUS["sm_90"],
    spills_in_l2: bool = False,
) -> float:
    """Clocks an SM takes for a block, `slots` of them at once, in the steady state."""
    num_blocks = 4 * slots if slots > 1 else 3
    ends = sorted(Simulation(code, trace, num_warps, slots, num_blocks, latencies, gpu, spills_in_l2).run().ends)
    return (ends[-1] - ends[slots - 1]) / (num_blocks - slots)


def microseconds(clocks: float, num_blocks: int, slots: int, gpu: Gpu = GPUS["sm_90"]) -> float:
    """Of a grid of `num_blocks`; the last round of blocks may leave places empty."""
    a_round = gpu.num_sms * slots
    return clocks * slots * math.ceil(num_blocks / a_round) / gpu.mhz
