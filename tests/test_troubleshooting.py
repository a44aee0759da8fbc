"""docs/troubleshooting.md quotes messages that the code has, and leaves none out that users meet."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GAP = "\0"  # what an f-string fills in
ERRORS = {"InputError", "DataError", "NonFiniteLossError", "Terminated", "_unsupported", "_refused", "refused"}
# Said to programmers: a library's argument that no flag sets, or a state that programs don't reach.
FOR_PROGRAMMERS = ("models/taps.py", "data/views.py", "data/plan.py", "data/loader.py", "models/preprocessing.py")


def quoted():
    """The messages in the first column of the page's tables."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def template(node):
    """The text of a string or f-string, with `GAP` for what is filled in; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    return None


def texts():
    """(file, text, whether it is raised for users) of each string in the package."""
    for path in sorted((ROOT / "tinymim_fast").rglob("*.py")):
        name = str(path.relative_to(ROOT / "tinymim_fast"))
        raised = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS:
                raised |= {id(part) for argument in node.args for part in ast.walk(argument)}
            text = template(node)
            if text:
                yield name, text, id(node) in raised


def says(message, text):
    """Whether `text` can be read as `message`: `…` and the gaps stand for anything."""
    pieces = [re.escape(piece) for piece in re.split("…", message) if piece]
    return re.search(".*".join(pieces), text, re.DOTALL) is not None


def test_every_message_that_is_quoted_exists():
    found = [text for _, text, _ in texts()]
    missing = [message for message in quoted() if not any(says(message, text) for text in found)]
    assert quoted() and not missing, f"no message in tinymim_fast/ reads so: {missing}"


SLACK = 5  # messages that may be newer than the page


def test_every_error_that_users_meet_is_quoted():
    messages = [message for message in quoted() if message != "got …, want …"]
    raised = [
        (name, text)
        for name, text, is_raised in texts()
        if is_raised and GAP in text and len(text) > 25 and not name.startswith(FOR_PROGRAMMERS)
    ]
    wants = re.compile(r"got \0.*want ", re.DOTALL)  # one line says it for all of them
    missing = [
        f"{name}: {text.replace(GAP, '…')}"
        for name, text in raised
        if not wants.search(text) and not any(says(message, text) for message in messages)
    ]
    assert len(raised) > 50 and len(missing) <= SLACK, "add these to docs/troubleshooting.md:\n" + "\n".join(missing)


def test_says():
    assert says("got …, want a folder", f"{GAP}: got {GAP}, want a folder") and says("want", "want")
    assert not says("got …, want a file", f"got {GAP}, want a folder")
