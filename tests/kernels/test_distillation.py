"""A run of distillation on the Triton kernels, in the interpreter."""

import numpy as np
import pytest

from support.programs import distill_flags
from tinymim_fast.kernels import tiles, triton_backend


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="needs TRITON_INTERPRET=1, which is for CPUs")
def test_a_run_on_triton_is_a_run_on_chunked(world, image_folder, teacher_file, tmp_path, monkeypatch):
    from support.runs import distil, losses

    # As fp16 and bf16 get it on a GPU; the interpreter takes it for fp32 too.
    tile = tiles.SinglePassTile(block_queries=16, num_warps=1)
    monkeypatch.setattr(triton_backend, "choose_tile", lambda operands: tile)
    curves = {}
    for backend in ("chunked", "triton"):
        flags = distill_flags(
            image_folder,
            teacher_file,
            tmp_path / backend,
            loss_backend=backend,
            bf16="false",  # the interpreter's bf16 products are wrong, the teacher's too
            teacher_precision="fp32",
            epochs=1,
            warmup_epochs=0,
        )
        distil(world, *flags)
        curves[backend] = [losses(tmp_path / backend, part) for part in ("loss", "qk", "vv")]
    assert len(curves["triton"][0]) == 6
    np.testing.assert_allclose(curves["triton"], curves["chunked"], rtol=1e-4)
