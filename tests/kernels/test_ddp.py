"""Two ranks under DistributedDataParallel have the gradient of the whole batch."""

import os
import sys
from pathlib import Path

import pytest

from support.programs import run_training

SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tinymim_fast import RelationLoss

dist.init_process_group("gloo")
torch.manual_seed(0)
tokens, qkv_t = torch.randn(4, 17, 24), torch.randn(4, 17, 3 * 48)
student, loss_fn = torch.nn.Linear(24, 3 * 24), RelationLoss(relation_heads=3, backend=sys.argv[1])
loss_fn(student(tokens), qkv_t)["loss"].backward()
whole = student.weight.grad.clone()
student.zero_grad()
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
parallel = DistributedDataParallel(student)
loss_fn(parallel(tokens[mine]), qkv_t[mine])["loss"].backward()
torch.testing.assert_close(student.weight.grad, whole)
assert whole.abs().sum() > 0
dist.destroy_process_group()
"""


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_two_ranks_have_the_gradient_of_the_whole_batch(tmp_path, backend):
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("CPU processes run the kernels in Triton's interpreter only")
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    torchrun = Path(sys.executable).parent / "torchrun"
    code, output = run_training(torchrun, "--standalone", "--nproc-per-node=2", script, backend)
    assert code == 0, output
