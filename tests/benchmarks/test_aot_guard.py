"""The guard against kernels that compile to worse code than before."""

import csv
import shutil
import subprocess

import pytest

import aot_guard

ROW = {
    "target": "sm_90",
    "num_tokens": "197",
    "head_dim_s": "16",
    "head_dim_t": "64",
    "dtype": "bfloat16",
    "use": "qk",
    "kernel": "single_pass",
    "block_queries": "16",
    "block_keys": "256",
    "num_warps": "4",
    "registers": "167",
    "spill_stores": "0",
    "spill_loads": "0",
    "shared_bytes": "57344",
    "blocks_per_sm": "3",
    "mufu_per_element": "2.14",
    "instructions_per_element": "23.9",
    "issue_us": "132.0",
    "simulated_us": "360.0",
    "triton": "3.6.0",
}
EXACT = {
    **ROW,
    "kernel": "single_pass_exact",
    "instructions_per_element": "33.0",
    "issue_us": "0.1",
    "simulated_us": "0.0",
}
AMD = {
    **ROW,
    "target": "gfx942",
    "blocks_per_sm": "",
    "mufu_per_element": "",
    "instructions_per_element": "",
    "issue_us": "",
    "simulated_us": "",
}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, []),
        ({"instructions_per_element": "24.1"}, []),  # rounding and half a percent
        ({"instructions_per_element": "24.2"}, ["instructions_per_element"]),
        ({"instructions_per_element": "20.0", "issue_us": "110"}, []),
        ({"mufu_per_element": "2.2"}, ["mufu_per_element"]),
        ({"registers": "168"}, []),
        ({"registers": "200", "blocks_per_sm": "2"}, ["warps per SM"]),
        ({"num_warps": "8", "blocks_per_sm": "2"}, []),  # 16 warps instead of 12
        ({"spill_stores": "1", "spill_loads": "2"}, ["spill_stores", "spill_loads"]),
        # Fewer instructions an element of a tile with more padding: the issue time of the problem tells.
        ({"block_keys": "512", "instructions_per_element": "20.0", "issue_us": "180"}, ["issue_us"]),
        ({"block_queries": "32", "instructions_per_element": "30.0", "issue_us": "120"}, []),
        ({"simulated_us": "367.0"}, []),  # rounding and two percent
        ({"simulated_us": "368.0"}, ["simulated_us"]),
        ({"simulated_us": ""}, []),  # the simulation refuses an instruction that a target has
    ],
)
def test_what_is_worse(changes, worse):
    found, vanished = aot_guard.compare([ROW, EXACT], [{**ROW, **changes}, EXACT])
    assert [r.figure for r in found] == worse and not vanished


def test_other_kernels_for_the_same_problem():
    tiled = {**ROW, "kernel": "tiled_d_x", "issue_us": "100"}
    assert aot_guard.compare([ROW, EXACT], [tiled]) == (
        [],
        ["sm_90 N=197 16x64 bfloat16 qk single_pass", "sm_90 N=197 16x64 bfloat16 qk single_pass_exact"],
    )
    worse, _ = aot_guard.compare([ROW, EXACT], [tiled, {**tiled, "kernel": "tiled_d_y"}])
    assert [(r.figure, r.before, r.after) for r in worse] == [
        ("issue_us", "132.1", "200.0"),
        ("simulated_us", "360.0", "720.0"),
    ]


def test_reports_without_uses_were_of_qk():
    before = [{name: value for name, value in ROW.items() if name != "use"}]
    lengths = {**ROW, "use": "rows", "issue_us": "200"}
    assert aot_guard.compare(before, [ROW, lengths]) == ([], [])
    worse, _ = aot_guard.compare(before, [{**ROW, "issue_us": "200"}, lengths])
    assert [r.figure for r in worse] == ["issue_us"]


def test_problems_may_come_but_not_go():
    wider = {**ROW, "head_dim_s": "32"}
    assert aot_guard.compare([ROW, EXACT], [ROW, EXACT, wider]) == ([], [])
    worse, _ = aot_guard.compare([ROW, EXACT, wider], [ROW, EXACT])
    assert [(r.problem, r.after) for r in worse] == [("sm_90 N=197 32x64 bfloat16 qk", "none")]


def test_targets_that_tell_less():
    assert aot_guard.compare([AMD], [{**AMD, "registers": "300"}]) == ([], [])
    worse, _ = aot_guard.compare([AMD], [{**AMD, "spill_stores": "4"}])
    assert [(r.figure, r.before, r.after) for r in worse] == [("spill_stores", "0", "4")]


class Repository:
    """Its commits report ROW with some figures changed."""

    def __init__(self, root):
        self.root = root
        (root / "benchmarks" / "results").mkdir(parents=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *command):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", "-C", self.root, *identity, *command], check=True, capture_output=True)

    def write(self, notes="# Notes\n", **figures):
        with (self.root / aot_guard.REPORT).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROW))
            writer.writeheader()
            writer.writerow({**ROW, **figures})
        (self.root / aot_guard.NOTES).write_text(notes)

    def commit(self, notes="# Notes\n", **figures):
        self.write(notes, **figures)
        self.git("add", "-A")
        self.git("commit", "--allow-empty", "-qm", "x")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return Repository(tmp_path / "repository")


def test_history(repository):
    root = repository.root
    with pytest.raises(aot_guard.NoPredecessor, match="no git repository with a commit"):
        aot_guard.check(root)
    repository.commit()
    with pytest.raises(aot_guard.NoPredecessor, match="the first one"):
        aot_guard.check(root)
    slower = {"instructions_per_element": "30.0", "issue_us": "165.0"}
    repository.write(**slower)
    worse, _ = aot_guard.check(root)
    assert "issue_us                  132.0   165.0" in worse and "Aot-accept: REASON" in worse
    repository.commit(**slower)
    assert aot_guard.check(root)[0].splitlines()[1:] == worse.splitlines()[1:]
    repository.commit(**slower)  # a later commit does not make it forgotten
    assert aot_guard.check(root)[0]
    repository.commit("# Notes\nAot-accept:  \n", **slower)
    assert aot_guard.check(root)[0]  # no reason given
    accepted = "# Notes\nAot-accept: right for lengths of 0\n"
    repository.commit(accepted, **slower)
    assert aot_guard.check(root) == ("", [])
    repository.commit(accepted, **{**slower, "issue_us": "190.0"})
    assert "165.0   190.0" in aot_guard.check(root)[0]  # what was accepted once does not cover the next
    repository.commit(accepted, issue_us="120")
    assert aot_guard.check(root) == ("", [])


def test_another_triton_is_not_compared(repository):
    repository.commit()
    repository.commit(issue_us="190.0", triton="3.7.0")
    with pytest.raises(aot_guard.NoPredecessor, match=r"made with Triton 3\.6\.0 in .*, now with 3\.7\.0"):
        aot_guard.check(repository.root)
    repository.commit(issue_us="200.0", triton="3.7.0")
    assert "190.0   200.0" in aot_guard.check(repository.root)[0]


def test_reports_before_the_column_were_made_with_one_triton():
    assert aot_guard.made_with([{"target": "sm_90"}]) == aot_guard.made_with([ROW]) == "3.6.0"


def test_a_merge_is_compared_with_its_first_parent(repository):
    repository.commit()
    repository.git("checkout", "-q", "-b", "work")
    repository.commit(issue_us="120")
    repository.commit(issue_us="130")
    repository.git("checkout", "-q", "main")
    repository.git("merge", "-q", "--no-ff", "-m", "x", "work")
    assert aot_guard.check(repository.root) == ("", [])


def test_a_shallow_clone_and_a_tarball(repository, tmp_path):
    repository.commit()
    repository.commit(issue_us="190")
    repository.git("clone", "-q", "--depth", "1", f"file://{repository.root}", str(tmp_path / "clone"))
    with pytest.raises(aot_guard.NoPredecessor, match="shallow clone"):
        aot_guard.check(tmp_path / "clone")
    shutil.copytree(repository.root, tmp_path / "tarball", ignore=shutil.ignore_patterns(".git"))
    with pytest.raises(aot_guard.NoPredecessor, match="no git repository"):
        aot_guard.check(tmp_path / "tarball")
