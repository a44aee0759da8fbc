"""What the simulation in latency.py assumes of an SM: latencies, units, and what an instruction asks of them."""

import re
from dataclasses import dataclass

from sass import Instruction


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Clocks until a result, or an event, is there."""

    mufu: int = 20
    shuffle: int = 24
    shared_load: int = 29
    matrix_load: int = 33
    shared_store: int = 22
    operands_read: int = 14
    memory: int = 700  # DRAM under load
    l2: int = 290
    l1: int = 42
    barrier: int = 24
    fence: int = 15
    wgmma_start: int = 12  # from the issue by all four warps
    wgmma_end: int = 30  # until the waiting warps go on
    hmma: int = 33
    branch: int = 8
    special: int = 40  # constants, special registers
    next_block: int = 500


MIDDLE = Latencies()
OPTIMISTIC = Latencies(
    mufu=18,
    shuffle=22,
    shared_load=23,
    matrix_load=28,
    shared_store=16,
    operands_read=10,
    memory=550,
    l2=262,
    l1=38,
    barrier=14,
    fence=8,
    wgmma_start=6,
    wgmma_end=18,
    branch=5,
    next_block=300,
)
PESSIMISTIC = Latencies(
    mufu=26,
    shuffle=27,
    shared_load=33,
    matrix_load=37,
    shared_store=30,
    operands_read=20,
    memory=900,
    l2=350,
    l1=48,
    barrier=36,
    fence=30,
    wgmma_start=20,
    wgmma_end=50,
    branch=12,
    next_block=800,
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """
    Args:
        mhz: clock at which kernels like these run, nominal.
        fma, hmma: clocks for which a warp's instruction keeps the unit of its sub-core busy.
        limits: of an SM, shared memory in bytes, warps, blocks.
    """

    num_sms: int
    mhz: float
    limits: tuple[int, int, int]
    fma: int = 1
    hmma: int = 8


GPUS = {
    "sm_80": Gpu(num_sms=108, mhz=1410, limits=(164 * 1024, 64, 32), fma=2),  # A100
    "sm_89": Gpu(num_sms=142, mhz=2490, limits=(100 * 1024, 48, 24), hmma=16),  # L40S
    "sm_90": Gpu(num_sms=132, mhz=1750, limits=(228 * 1024, 64, 32)),  # H100, H200
    "sm_100": Gpu(num_sms=148, mhz=1850, limits=(228 * 1024, 64, 32)),  # B200
}

FMA, ALU, IMAD, XU, MEM, HMMA, NO_UNIT = range(7)
UNITS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "FFMA2", "HFMA2", "HADD2", "HMUL2"), FMA),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND"), XU),
    **dict.fromkeys(("IMAD", "IDP", "IMUL"), IMAD),
    **dict.fromkeys(("LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL", "ATOMS", "LDG", "STG", "LDGSTS", "RED"), MEM),
    "HMMA": HMMA,
}
# Neither takes a unit that matters: control, uniform registers, and what has rules of its own.
CONTROL = [
    "NOP",
    "WARPGROUP",
    "BSSY",
    "DEPBAR",
    "LDGDEPBAR",
    "WARPSYNC",
    "FENCE",
    "MEMBAR",
    "BAR",
    "EXIT",
    "BRA",
    "BSYNC",
    "HGMMA",
    "LDC",
    "S2R",
    "S2UR",
    "ULDC",
    "R2UR",
    "CS2R",
    "ERRBAR",
    "YIELD",
    "ELECT",
    "CCTL",
    "USETMAXREG",
    "PLOP3",
    "P2R",
    "R2P",
    "VOTE",
    "VOTEU",
    "CALL",
    "RET",
    "NANOSLEEP",
]
REFUSED = re.compile(r"UTMA|UBLKCP|SYNCS|UTC|LDTM|STTM|UTCBAR|ACQBULK|QGMMA|IGMMA")


class NotModelled(Exception):
    """The machine code has instructions that the simulation knows nothing of; names one."""


class Step:
    """An instruction, made ready for the simulation."""

    __slots__ = (
        "instruction",
        "latency",
        "operation",
        "product",
        "read",
        "stall",
        "unit",
        "waits",
        "wavefronts",
        "write",
    )

    def __init__(self, instruction: Instruction, latencies: Latencies, spills_in_l2: bool) -> None:
        self.instruction = instruction
        self.operation = operation = instruction.operation
        if REFUSED.match(operation):
            raise NotModelled(instruction.opcode)
        self.unit = UNITS.get(operation, NO_UNIT if operation in CONTROL or re.match("U[A-Z]", operation) else ALU)
        self.stall = max(1, instruction.stall)
        self.waits = instruction.waits
        self.write, self.read = instruction.write_barrier, instruction.read_barrier
        self.latency = {
            "SHFL": latencies.shuffle,
            "LDS": latencies.shared_load,
            "LDSM": latencies.matrix_load,
            "STS": latencies.shared_store,
            "STSM": latencies.shared_store,
            "STL": latencies.shared_store,
            "LDL": latencies.l2 if spills_in_l2 else latencies.l1,
            "ATOMS": latencies.shared_load,
            "LDG": latencies.memory,
            "LDGSTS": latencies.memory,
            "HMMA": latencies.hmma,
            **dict.fromkeys(("S2R", "S2UR", "LDC", "ULDC"), latencies.special),
        }.get(operation, latencies.mufu if self.unit == XU else 12)
        self.wavefronts = _wavefronts(instruction) if self.unit == MEM else 0
        self.product = _product(instruction) if operation == "HGMMA" else None


def _wavefronts(instruction: Instruction) -> int:
    """Clocks of the data path, 128 bytes each."""
    if instruction.operation in ("LDSM", "STSM"):
        last = instruction.opcode.rsplit(".", 1)[1]
        return int(last) if last.isdigit() else 1
    return 4 if ".128" in instruction.opcode else 2 if ".64" in instruction.opcode else 1


def _product(instruction: Instruction) -> tuple[int, int, str, bool]:
    """Of a wgmma: clocks of the matrix unit, clocks until the next one may add to its sum, the sum, ends its group."""
    width = int(re.search(r"64x(\d+)x\d+", instruction.opcode)[1])
    operands = instruction.operands.split(",")
    in_registers = not operands[1].strip().startswith("gdesc")  # else 64 x 16 and N x 16 come from shared memory
    least, chained = (8, 13) if in_registers else (16 + width // 4, 16 + width // 4)
    busy = max(width // 2, least)
    return busy, max(width // 2, chained), operands[0].strip(), "gsb" in instruction.operands
