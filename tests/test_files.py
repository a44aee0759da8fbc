import os

import pytest

from tinymim_fast.files import whole_file, whole_folder


def test_the_current_folder_is_filled_and_stays_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    with whole_folder(".") as folder:
        (folder / "a").write_text("1")
        (folder / "b").write_text("2")
        assert [path.name for path in tmp_path.iterdir()] == [folder.name], "nothing under its name before all is there"
    assert sorted(os.listdir()) == ["a", "b"] and os.stat(".").st_ino == inode
    with pytest.raises(OSError, match="not empty"), whole_folder(".") as folder:
        (folder / "c").write_text("3")
    assert sorted(os.listdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["new", "new/", "sub/new", "./new"])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError), whole_folder(name) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("**/tmp_*"))
    with whole_folder(name) as folder:
        (folder / "a").write_text("1")
    assert (tmp_path / name / "a").read_text() == "1" and not list(tmp_path.glob("**/tmp_*"))


def test_an_empty_folder_is_taken_and_a_full_one_is_left(tmp_path):
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(OSError), whole_folder(tmp_path / "empty") as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "a"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.png"]
