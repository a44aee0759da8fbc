import pytest


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Programs that are called here are alone, also after the fixture `world` set what a launcher sets."""
    monkeypatch.delenv("RANK", raising=False)
