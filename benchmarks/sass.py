"""NVIDIA machine code as cuobjdump prints it: its instructions with their control bits, and ways through it.

An instruction of 128 bits (sm_70 and later) carries how the scheduler has to treat it: for how many clocks the warp
issues nothing after it, which of the warp's six scoreboards it waits for, and which it sets until its result is there
(write barrier) or its operands are read (read barrier). The encoding is not documented; it is the one that assemblers
such as CuAssembler and Turingas found.
"""

import math
import re
import subprocess
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import triton

NVIDIA_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([^\s;]+)(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
SECOND_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
CONDITION = re.compile(r"\bU?P\d")


@dataclass(frozen=True)
class Instruction:
    """
    Args:
        stall: clocks until the warp may issue its next instruction.
        waits: scoreboards that must be released before it issues.
        write_barrier, read_barrier: scoreboards that it sets, None where it sets none.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int = 1
    waits: tuple[int, ...] = ()
    write_barrier: int | None = None
    read_barrier: int | None = None

    @property
    def operation(self) -> str:
        """The opcode without its modifiers: HGMMA of HGMMA.64x256x16.F32.BF16."""
        return self.opcode.split(".")[0]


def disassembled(cubin: bytes) -> tuple[list[Instruction], int]:
    """Machine code and registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(flag: str) -> str:
            command = [str(NVIDIA_BIN / "cuobjdump"), flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        lines = run("-sass").splitlines()
        registers = int(re.search(r"REG:(\d+)", run("-res-usage"))[1])
    return parsed(lines), registers


def parsed(lines: list[str]) -> list[Instruction]:
    """The instructions among the lines of `cuobjdump -sass`; the upper 64 bits stand on the line below."""
    code = []
    for line, below in zip(lines, [*lines[1:], ""]):
        if match := LINE.match(line):
            address, predicate, opcode, operands, _ = match.groups()
            control = int(SECOND_HALF.match(below)[1], 16) >> 41 & (1 << 21) - 1
            write, read, waits = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            code.append(
                Instruction(
                    address=int(address, 16),
                    predicate=(predicate or "").strip(),
                    opcode=opcode,
                    operands=operands,
                    stall=control & 15,
                    waits=tuple(i for i in range(6) if waits >> i & 1),
                    write_barrier=write if write < 6 else None,
                    read_barrier=read if read < 6 else None,
                )
            )
    return code


def successors(code: list[Instruction]) -> list[list[int]]:
    """Of each instruction, the indices of those that may follow it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    after: list[list[int]] = []
    for i, instruction in enumerate(code):
        operation = instruction.operation
        conditional = bool(instruction.predicate) or CONDITION.search(instruction.operands) is not None
        next_ones = [i + 1] if conditional or operation not in ("BRA", "CALL", "EXIT", "RET") else []
        if operation in ("BRA", "CALL"):  # here, a CALL is a jump that does not come back
            next_ones.append(index[int(re.search(r"0x([0-9a-f]+)", instruction.operands)[1], 16)])
        after.append([j for j in next_ones if j < len(code)])
    return after


def shortest_path(
    after: list[list[int]], start: int, goals: set[int], without: tuple[int, int] = (-1, -1)
) -> list[int]:
    """Indices from `start` to the nearest goal, empty if there is no way but over the edge `without`."""
    previous = {start: -1}
    queue = deque([start])
    while queue:
        i = queue.popleft()
        if i in goals:
            path = [i]
            while previous[path[-1]] >= 0:
                path.append(previous[path[-1]])
            return path[::-1]
        for j in after[i]:
            if j not in previous and (i, j) != without:
                previous[j] = i
                queue.append(j)
    return []


def longest_path(after: list[list[int]], start: int, goals: set[int]) -> list[int]:
    """As shortest_path, without jumps backwards, and as many instructions as possible."""
    length, following = {}, {}
    for i in range(len(after) - 1, start - 1, -1):
        ahead = max((j for j in after[i] if j > i and j in length), key=lambda j: length[j], default=None)
        if i in goals or ahead is not None:
            length[i] = 1 + (0 if i in goals else length[ahead])
            following[i] = None if i in goals else ahead
    path = [start] if start in length else []
    while path and following[path[-1]] is not None:
        path.append(following[path[-1]])
    return path


def executed(
    code: list[Instruction], num_iterations: int, skip_loop: bool = False, long_way_out: bool = False
) -> list[int]:
    """Indices of the warp instructions on the shortest path; its loop runs `num_iterations` times, or is skipped.

    With `long_way_out` nothing behind the loop is skipped: the gradient of a relation of a tensor with itself.
    """
    after = successors(code)
    ends = {i for i, instruction in enumerate(code) if instruction.opcode == "EXIT"}
    # With a loop around all others, the last exit is conditional too.
    exits = ends if skip_loop else ({i for i in ends if not code[i].predicate} or ends)
    # Backward jumps: the widest is the loop over tiles, others wait for a barrier and are passed once.
    loops = [(i, j) for i, targets in enumerate(after) for j in targets if j < i]
    if skip_loop or not loops:
        return shortest_path(after, 0, exits)
    # The second launch has a loop over maps around that over tiles, which alone cannot pass by the exponentials.
    exponentials = {
        loop: sum(code[i].opcode == "MUFU.EX2" for i in shortest_path(after, loop[1], {loop[0]})) for loop in loops
    }
    latch, header = max(loops, key=lambda loop: (exponentials[loop], loop[0] - loop[1]))
    # The loop is left behind its last instruction, or at its first.
    way_out = shortest_path(after, latch, exits, (latch, header))[1:] or shortest_path(after, header, exits)
    way_in, once = shortest_path(after, 0, {header})[:-1], shortest_path(after, header, {latch})
    assert way_in and once and way_out, "no way through the code"
    return way_in + once * num_iterations + ((long_way_out and longest_path(after, way_out[0], exits)) or way_out)


def blocks_per_sm(registers: int, shared_bytes: int, num_warps: int, limits: tuple[int, int, int]) -> int:
    """How many thread blocks live on an SM of 65,536 registers; `limits`: shared memory in bytes, warps, blocks."""
    shared, warps, blocks = limits
    by_registers = 65536 // (32 * num_warps * math.ceil(registers / 8) * 8)
    return min(by_registers, shared // (shared_bytes + 1024), warps // num_warps, blocks)
