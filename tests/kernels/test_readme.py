"""The README's snippets run as they stand."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent.parent / "README.md").read_text()
SECTION = README.split("## Drop-in loss", 1)[1].split("\n## ", 1)[0]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


def test_there_are_three():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["timm", "hugging-face", "text"])
def test_snippet(snippet):
    packages = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    names = {"__name__": "snippet"}
    exec(compile(snippet, "README.md", "exec"), names)
    student = names.get("student") or names["qkv_s"]
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
