"""Tile choices: checked in, one frozen tile per architecture, N bucket, head widths and dtype.

Nothing is tuned in a training run. `python benchmarks/tune_tiles.py` measures `candidates` on the GPU at hand and
prints lines for `TUNED`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, kw_only=True)
class SinglePassTile:
    """Of the kernel that keeps all keys of a head on the chip.

    Args:
        block_queries: queries in a tile.
        num_warps, num_stages: of the launch, and of the loop over tiles.
        key_groups: parts of a row that different threads hold; where it fits the layout that Triton gives the maps,
            keys beyond N cost no instructions.
        ahead: queries are read behind the exponentials of the block before, not at the head of their own.
        staggered: of two programs on an SM, one of the first begins half a block later; see device_math.stagger.
    """

    block_queries: int
    num_warps: int
    num_stages: int = 1
    key_groups: int = 1
    ahead: bool = False
    staggered: bool = False


@dataclass(frozen=True, kw_only=True)
class TiledTile:
    """Of the kernels that take `block_keys` keys at a time.

    Args:
        block_queries, block_keys: queries and keys in a tile; in the gradient kernels, own and other tokens.
        num_warps, num_stages: of the launch, and of the loop over tiles.
    """

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a choice depends on; widths are padded to powers of two, arch is None where it is unknown.

    Args:
        arch: "sm_90", "gfx942" and so on.
        bucket: smallest power of two, at least 16, that holds N.
        head_dim_s, head_dim_t: padded widths.
        itemsize: bytes of the wider of the two dtypes.
        d_y: whether the gradient of y is wanted, whose sum over the queries stays in registers.
        lengths: whether keys are masked by image, which takes registers as well.
    """

    arch: str | None
    bucket: int
    head_dim_s: int
    head_dim_t: int
    itemsize: int
    d_y: bool = True
    lengths: bool = False


# Heads are whole on the chip up to this width; the tiled kernels take wider ones in chunks.
WHOLE_WIDTH = 128

# Measured choices, printed by benchmarks/tune_tiles.py. Empty: nothing was measured yet.
TUNED: dict[Problem, SinglePassTile | TiledTile] = {}

# Where one operand of the matrix unit stays out of the registers, or there are 512 of them.
ROOMY = ("sm_90", "sm_100", "gfx90a", "gfx942")

# Shared memory that one program may have, in bytes.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
}


def choose(problem: Problem) -> SinglePassTile | TiledTile:
    """The checked-in choice, else the default."""
    return TUNED.get(problem) or default(problem)


def default(problem: Problem) -> SinglePassTile | TiledTile:
    """For hardware that nobody has tuned: what is simulated as fastest, see benchmarks/results/aot_report.csv.

    On sm_90 that is whole rows on four warps, two blocks an SM of which one computes while the other waits, as long as
    spilled registers stay in L1; else half rows on eight warps. Elsewhere, what compiles without spills.
    """
    bucket, num_stages, whole_rows = problem.bucket, 1, False
    wide = problem.head_dim_s > 16 or problem.head_dim_t > 64
    if bucket <= 32:
        block_queries, num_warps, key_groups = 16, 1, 1
    elif problem.arch == "sm_90":
        room = not problem.d_y or (problem.head_dim_s <= 32 and not problem.lengths)
        whole_rows = bucket < 256 or (problem.head_dim_t <= 64 and room)
        block_queries, num_warps, key_groups, num_stages = (64, 4, 1, 1) if whole_rows else (64, 8, 2, 3)
    elif bucket == 256 and (problem.arch == "sm_100" or (wide and problem.arch not in ROOMY)):
        block_queries, num_warps, key_groups = 32, 8, 1
    else:
        block_queries, num_warps, key_groups = 16, min(4, bucket // 32), 1
    for stages in dict.fromkeys((num_stages, 1)):
        tile = SinglePassTile(
            block_queries=block_queries,
            num_warps=num_warps,
            num_stages=stages,
            key_groups=key_groups,
            ahead=whole_rows and bucket == 256 and problem.d_y and problem.head_dim_s == 16,
            staggered=whole_rows and bucket >= 128,
        )
        if fits_single_pass(problem, tile):
            return tile
    return default_tiled(problem)


def default_tiled(problem: Problem) -> TiledTile:
    """For rows that do not fit on the chip: compiles without spills, as `default`."""
    wide = max(problem.head_dim_s, problem.head_dim_t) == WHOLE_WIDTH
    if max(problem.head_dim_s, problem.head_dim_t) > WHOLE_WIDTH:
        block_queries, block_keys, num_warps = (16, 16, 4) if problem.itemsize == 4 else (64, 32, 8)
    elif problem.itemsize == 4:
        # On sm_90 64 queries fill a wgmma, of which TF32 products are made.
        block_queries, block_keys, num_warps = (64 if problem.arch == "sm_90" and not wide else 32), 16, 4
    elif problem.arch == "sm_100":
        block_queries, block_keys, num_warps = 128, 32, 8 if wide else 4
    elif problem.arch in ROOMY:
        block_queries, block_keys, num_warps = 64, 32, 4
    elif wide and SHARED_MEMORY.get(problem.arch, 0) > 80 * 1024:
        block_queries, block_keys, num_warps = 128, 16, 8
    else:
        block_queries, block_keys, num_warps = 64, 16, 4
    return TiledTile(block_queries=block_queries, block_keys=block_keys, num_warps=num_warps)


def fits_single_pass(problem: Problem, tile: SinglePassTile) -> bool:
    """Whether the keys of a head and the maps of a block of queries fit into registers and shared memory."""
    widest_s = 64 if problem.bucket < 256 or problem.arch in ROOMY else 32
    if (
        problem.bucket > 256
        or problem.itemsize > 2
        or problem.head_dim_s > widest_s
        or problem.head_dim_t > WHOLE_WIDTH
    ):
        return False
    widths = problem.head_dim_s + problem.head_dim_t
    maps = 1 if tile.key_groups == 1 else 2  # d_logits changes hands, once for each product
    # Triton keeps one block more than it has stages; unpipelined, the one at work.
    blocks = 1 if tile.num_stages == 1 else tile.num_stages + 1
    elements = (problem.bucket + blocks * tile.block_queries) * widths + maps * problem.bucket * tile.block_queries
    return elements * problem.itemsize <= SHARED_MEMORY.get(problem.arch, 64 * 1024)


def candidates(problem: Problem) -> Iterator[SinglePassTile | TiledTile]:
    """The search space."""
    if problem.bucket <= 256 and max(problem.head_dim_s, problem.head_dim_t) <= WHOLE_WIDTH:
        for block_queries in (16, 32, 64):
            for num_warps in (1, 2, 4, 8):
                elements = block_queries * problem.bucket // (32 * num_warps)  # of each map, in one thread
                if 16 <= elements <= 128:
                    groups = {1, max(1, 16 * num_warps // block_queries)}
                    # Read ahead, queries need no stages; staggered are programs of which two fill an SM.
                    for key_groups, (num_stages, ahead), staggered in product(
                        groups,
                        ((1, False), (1, True), (2, False), (3, False)),
                        (False, True) if num_warps == 4 and elements >= 64 else (False,),
                    ):
                        yield SinglePassTile(
                            block_queries=block_queries,
                            num_warps=num_warps,
                            num_stages=num_stages,
                            key_groups=key_groups,
                            ahead=ahead,
                            staggered=staggered,
                        )
    for block_queries in (32, 64, 128):
        for block_keys in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3):
                    yield TiledTile(
                        block_queries=block_queries,
                        block_keys=block_keys,
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )
