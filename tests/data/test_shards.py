"""Shards as others write them, and as nobody should."""

import io
import re
import tarfile

import pytest
from PIL import Image

from tinymim_fast.data import DataError, scan_images
from tinymim_fast.data.shards import read_shard


def picture(mode="RGB", format="JPEG"):
    buffer = io.BytesIO()
    Image.new(mode, (32, 24)).save(buffer, format)
    return buffer.getvalue()


JPEG = picture()


def write_shard(path, *members):
    """Members are (name, content), or (name, {TarInfo's fields})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, dict):
                for field, value in content.items():
                    setattr(member, field, value)
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.fault(
    "shards with text labels, broken sidecars, ._ files, masks, links",
    "pictures with their labels; what is none is left out and counted",
    tries=12,
)
@pytest.mark.parametrize(
    ("members", "paths", "labels", "class_names", "left_out"),
    [
        (
            [("a.jpg", JPEG), ("a.cls", b"n01440764"), ("b.jpg", JPEG), ("b.cls", b" cat\n")],
            "b.jpg a.jpg",
            [0, 1],
            ("cat", "n01440764"),
            {},
        ),
        (
            [("a.jpg", JPEG), ("a.cls", b"7"), ("b.jpg", JPEG), ("b.cls", b"cat")],
            "a.jpg b.jpg",
            [0, 1],
            ("7", "cat"),
            {},
        ),
        ([("a.jpg", JPEG), ("a.json", b"")], "a.jpg", [0], ("data",), {"sidecar without a label": 1}),
        (
            [("a.jpg", JPEG), ("a.json", b'{"label":'), ("a.cls", b"2")],
            "a.jpg",
            [2],
            ("0", "1", "2"),
            {"sidecar without a label": 1},
        ),
        ([("a.jpg", JPEG), ("a.json", b'{"label": "3"}')], "a.jpg", [3], ("0", "1", "2", "3"), {}),
        (
            [("a.jpg", JPEG), ("a.json", b'{"label": {"x": 3}}')],
            "a.jpg",
            [0],
            ("data",),
            {"sidecar without a label": 1},
        ),
        ([("a.jpg", JPEG), ("a.json", b"[" * 60000)], "a.jpg", [0], ("data",), {"sidecar without a label": 1}),
        ([("a.jpg", JPEG), ("a.cls", b"1" * 70000)], "a.jpg", [0], ("data",), {"sidecar without a label": 1}),
        ([("._a.jpg", b"\0\5\26\7"), ("a.jpg", JPEG), ("a.cls", b"0")], "a.jpg", [0], ("0",), {"._ file": 1}),
        (
            [("a.mask.png", picture("L", "PNG")), ("a.jpg", JPEG), ("a.cls", b"0")],
            "a.jpg",
            [0],
            ("0",),
            {"further picture of a sample": 1},
        ),
        (
            [
                ("a.jpg", JPEG),
                ("a.cls", b"0"),
                ("b.jpg", {"type": tarfile.LNKTYPE, "linkname": "a.jpg"}),
                ("c.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
            ],
            "a.jpg",
            [0],
            ("0",),
            {"link or special member": 2},
        ),
        (
            [("d", {"type": tarfile.DIRTYPE}), ("d/x.jpg", JPEG), ("e/x.jpg", JPEG)],
            "d/x.jpg e/x.jpg",
            [0, 0],
            ("data",),
            {},
        ),
    ],
    ids=[
        "names",
        "mixed",
        "empty_json",
        "broken_json",
        "text_in_json",
        "odd_json",
        "deep_json",
        "long_cls",
        "macos",
        "mask",
        "links",
        "folders",
    ],
)
def test_what_is_a_picture_of_the_set(tmp_path, caplog, members, paths, labels, class_names, left_out):
    path = write_shard(tmp_path / "data" / "0.tar", *members)
    assert dict(read_shard(str(path)).left_out) == left_out
    index = scan_images(tmp_path / "data", workers=1)
    assert index.paths == paths.split() and index.labels.tolist() == labels and index.class_names == class_names
    assert all(index.read_image(i).size == (32, 24) for i in range(len(index)))
    for kind, count in left_out.items():
        assert f"{count} x {kind}" in caplog.text


@pytest.mark.fault(
    "shards with ids for labels, a name twice, no pictures", "refused, with the member that is wrong", tries=5
)
@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("a.jpg", JPEG), ("a.cls", b"3000000000")],
            "a.cls has the label 3000000000, want a class: 0 to 999,999, or a name",
        ),
        ([("a.jpg", JPEG), ("a.cls", b"-1")], "a.cls has the label -1, want a class"),
        ([("a.jpg", JPEG), ("a.json", b'{"label": 30000000}')], "a.json has the label 30000000"),
        ([("a.jpg", JPEG), ("a.jpg", JPEG)], "a.jpg comes twice; names must differ"),
        ([("a.txt", b"no picture")], "whose shards have no images"),
    ],
)
def test_what_is_refused(tmp_path, members, message):
    write_shard(tmp_path / "data" / "0.tar", *members)
    with pytest.raises(DataError, match=re.escape(message)):
        scan_images(tmp_path / "data", workers=1)


def test_names_that_come_in_two_shards_are_told_apart(tmp_path):
    for i, size in enumerate((JPEG, picture("L"))):
        write_shard(
            tmp_path / "data" / f"{i}.tar",
            ("x.jpg", size),
            ("x.cls", str(i).encode()),
            (f"y{i}.jpg", size),
            (f"y{i}.cls", b"0"),
        )
    index = scan_images(tmp_path / "data", workers=1)
    assert index.paths == ["0.tar/x.jpg", "y0.jpg", "y1.jpg", "1.tar/x.jpg"]
    assert [len(index.encoded(i)) for i in range(4)] == [len(JPEG), len(JPEG), len(picture("L")), len(picture("L"))]


@pytest.mark.fault("an index or a shard that claims gigabytes", "refused or left out, not unpacked", tries=1)
def test_a_sparse_member_is_not_unpacked(tmp_path):
    """An 18 KB archive may claim 10 GiB."""
    path = tmp_path / "data" / "0.tar"
    write_shard(path, ("b.jpg", JPEG), ("b.cls", b"0"))
    sparse = {"type": tarfile.GNUTYPE_SPARSE, "size": 0}
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("a.jpg")
        for field, value in sparse.items():
            setattr(member, field, value)
        header = bytearray(member.tobuf(format=tarfile.GNU_FORMAT))
        header[483:495] = (10 << 30).to_bytes(12, "big")  # its size once unpacked, base 256
        header[483] = 0x80
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar.fileobj.seek(tar.offset)
        tar.fileobj.write(bytes(header))
        tar.offset += len(header)
    shard = read_shard(str(path))
    assert [sample.name for sample in shard.samples] == ["b.jpg"] and shard.left_out == {"link or special member": 1}
