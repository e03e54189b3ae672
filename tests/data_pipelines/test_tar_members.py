"""What is in a tar, row by row, in few bytes; and named errors for what is no whole tar."""

import contextlib
import gzip
import io
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_pipelines.tar_members import (
    MemberTable,
    ShardMismatchError,
    members_from_parquet,
    members_to_parquet,
    notes_of_parquet,
    row_span,
    scan_tar,
)
from tests.tars import Members, by_webdataset, headers, tar_of

TWO: Members = [("a.jpg", b"x" * 700), ("a.json", b"{}"), ("b.jpg", b"y" * 700), ("b.json", b"[]")]
LONG = "long-name-" * 30


def contents(table: MemberTable, data: bytes) -> dict[str, dict[str, bytes]]:
    """Every sample read back out of the tar through the table, CRC checked."""
    samples: dict[str, dict[str, bytes]] = {}
    for row, key in enumerate(table.keys):
        samples[key] = {}
        for extension in table.extensions:
            offset = int(table.offsets[extension][row])
            if offset >= 0:
                content = data[offset : offset + int(table.sizes[extension][row])]
                assert zlib.crc32(content) == table.crc32s[extension][row]
                samples[key][extension] = content
    return samples


# --------------------------------------------------------------------------------- what is in a tar


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_a_tar_is_read_by_offset_size_and_checksum(tar_format: int):
    data = tar_of(TWO, tar_format)
    table = scan_tar(data, "u")
    assert table.keys == ("a", "b")
    assert table.extensions == ("jpg", "json")
    assert contents(table, data) == {
        "a": {"jpg": b"x" * 700, "json": b"{}"},
        "b": {"jpg": b"y" * 700, "json": b"[]"},
    }


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_that_plain_tarfile_writes_are_read(tar_format: int):
    members = [(LONG + ".jpg", b"1"), (LONG + ".json", b"2"), ("ü/" + "ñ" * 90 + ".jpg", b"3")]
    data = tar_of(members, tar_format)
    assert contents(scan_tar(data, "u"), data) == {
        LONG: {"jpg": b"1", "json": b"2"},
        "ü/" + "ñ" * 90: {"jpg": b"3"},
    }


def test_a_sample_may_lack_a_member_and_a_member_may_be_empty():
    data = tar_of([("a.jpg", b""), ("b.json", b"{}"), ("c.jpg", b"1"), ("c.json", b"2")])
    table = scan_tar(data, "u")
    assert table.offsets["jpg"][1] < 0 > table.offsets["json"][0]
    assert contents(table, data) == {
        "a": {"jpg": b""},
        "b": {"json": b"{}"},
        "c": {"jpg": b"1", "json": b"2"},
    }


def test_folders_are_no_samples():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("d.jpg")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        info = tarfile.TarInfo("d/b.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    assert scan_tar(buffer.getvalue(), "u").keys == ("d/b",)


names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "d/", "d.e/", "./", "d/e/"]),
    st.text("aBü-_", min_size=1, max_size=3),
    st.text("jJ.g", min_size=1, max_size=4),
) | st.sampled_from(["README", ".hidden", ".DS_Store", "d/NOTES", "d/.hidden", "__meta__"])


@settings(deadline=None, max_examples=100)
@given(st.lists(names, max_size=6, unique=True))
def test_names_make_the_same_samples_as_in_webdataset(found: list[str]):
    data = tar_of([(name, name.encode()) for name in sorted(found)])
    try:
        table = scan_tar(data, "u")
    except ShardMismatchError:
        assume(False)  # names that stand twice have a test of their own
    assume(table.num_interleaved == 0)
    assert contents(table, data) == by_webdataset(data)


def test_members_of_a_sample_need_not_lie_side_by_side_but_such_samples_are_counted():
    data = tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"3"), ("c.jpg", b"4")])
    table = scan_tar(data, "u")
    assert contents(table, data) == {
        "a": {"jpg": b"1", "json": b"3"},
        "b": {"jpg": b"2"},
        "c": {"jpg": b"4"},
    }
    assert len(by_webdataset(data)) == 3, "a is there twice, the second time without its image"
    assert table.num_interleaved == 1
    assert scan_tar(tar_of(TWO), "u").num_interleaved == 0


@pytest.mark.parametrize("second", ["a.jpg", "a.JPG"])
def test_a_name_that_stands_twice_is_refused(second: str):
    with pytest.raises(
        ShardMismatchError, match=rf"u: member {second} stands twice in sample a; .* again"
    ):
        scan_tar(tar_of([("a.jpg", b"1"), (second, b"2")]), "u")


# ----------------------------------------------------------------------------------- what is no tar


@pytest.mark.parametrize(
    ("fill", "why"),
    [
        (b"x", "is cut short|empty file|truncated header"),
        (b"\0", "is cut short|empty file|truncated header|unexpected end of data"),
    ],
    ids=["text", "zeros"],
)
def test_a_tar_that_was_cut_anywhere_is_refused(fill: bytes, why: str):
    data = tar_of([(f"{n}.npy", fill * 1_600) for n in range(3)])
    last = headers(data)[-1]
    end = last.offset_data + 2_048
    cuts = set(range(0, end + 1_024, 128)) | {end + 1_023}
    cuts |= {header.offset for header in headers(data)}  # exactly at member boundaries
    for cut in sorted(cuts):
        with pytest.raises(ShardMismatchError, match=rf"s3://b/x\.tar .*({why})"):
            scan_tar(data[:cut], "s3://b/x.tar")
    whole = scan_tar(data[: end + 1_024], "u")  # the padding behind the end mark is not content
    assert whole.keys == scan_tar(data, "u").keys == ("0", "1", "2")


def test_a_damaged_header_does_not_end_the_tar_in_silence():
    data = bytearray(tar_of(TWO))
    at = headers(bytes(data))[2].offset
    data[at + 3] ^= 1
    assert len(by_webdataset(bytes(data))) == 1, "the reason for the check: half the samples"
    with pytest.raises(ShardMismatchError, match=f"goes on after byte {at}, .* is damaged"):
        scan_tar(bytes(data), "u")


def test_a_tar_with_a_second_one_behind_it_is_refused():
    with pytest.raises(ShardMismatchError, match="a second tar was appended"):
        scan_tar(tar_of(TWO) + tar_of([("c.jpg", b"1")]), "u")


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"x" * 600 + b"\0" * 2_048, gzip.compress(tar_of(TWO))]
)
def test_what_is_no_tar_at_all_is_refused(data: bytes):
    with pytest.raises(ShardMismatchError, match="u "):
        scan_tar(data, "u")


@pytest.mark.parametrize("data", [tar_of([]), tar_of([("README", b"hi")])])
def test_a_tar_may_hold_no_sample(data: bytes):
    assert scan_tar(data, "u").keys == ()


# ---------------------------------------------------------------------------------------- the table


tars = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["jpg", "json", "seg.png"])),
    unique=True,
    min_size=1,
).map(lambda names: tar_of([(f"{k}.{e}", (k * 700 + e).encode()) for k, e in names]))


@settings(deadline=None, max_examples=50)
@given(tars)
def test_a_table_is_read_back_as_it_was_scanned(data: bytes):
    table = scan_tar(data, "u")
    parquet = members_to_parquet(table, {"name": "x.tar"})
    again = members_from_parquet(parquet)
    assert contents(again, data) == contents(table, data)
    assert again.digest == table.digest
    assert notes_of_parquet(parquet) == {"name": "x.tar"}


@settings(deadline=None, max_examples=50)
@given(tars, st.data())
def test_a_span_holds_all_that_was_asked_for_and_begins_and_ends_with_it(data: bytes, draw):
    table = scan_tar(data, "u")
    first = draw.draw(st.integers(0, len(table.keys) - 1))
    last = draw.draw(st.integers(first + 1, len(table.keys)))
    wanted = draw.draw(st.lists(st.sampled_from(table.extensions), unique=True))
    spans = [
        (int(table.offsets[e][row]), int(table.offsets[e][row] + table.sizes[e][row]))
        for e in wanted
        for row in range(first, last)
        if table.offsets[e][row] >= 0
    ]
    expected = (min(s for s, _ in spans), max(e for _, e in spans)) if spans else (0, 0)
    assert row_span(table, first, last, wanted) == expected


def test_the_digest_depends_on_everything_and_never_changes_between_versions():
    def table(key: str = "a", offset: int = 512, size: int = 7, crc32: int = 9) -> MemberTable:
        return MemberTable(
            (key,),
            {"jpg": np.array([offset])},
            {"jpg": np.array([size])},
            {"jpg": np.array([crc32], np.uint32)},
        )

    changed = [table(key="b"), table(offset=1024), table(size=8), table(crc32=10)]
    assert len({t.digest for t in (table(), *changed)}) == 5
    assert table().digest == ("a8a17e1a440b7570324792b062868863354814da98a280226f5878aca4dfad4a")


def test_a_sample_of_an_img2dataset_shard_takes_at_most_24_bytes():
    random = np.random.default_rng(0)
    members = [
        (f"{row:09d}.{extension}", random.bytes(int(random.lognormal(mean, 0.6))))
        for row in range(2_000)
        for extension, mean in (("jpg", 9.5), ("json", 6.3), ("txt", 4.0))
    ]
    table = scan_tar(tar_of(members, tarfile.USTAR_FORMAT), "u")
    assert len(members_to_parquet(table, {})) / 2_000 <= 24


@pytest.mark.parametrize(
    "name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "a\tb.jpg", "a\nb.jpg", "a\x1b[2J.jpg"]
)
def test_names_that_lead_or_break_out_are_refused(name: str):
    with pytest.raises(ShardMismatchError, match=r"u: member .* has a name that is absolute, lead"):
        scan_tar(tar_of([("good.jpg", b"1"), (name, b"2")]), "u")


# --- headers that lead a reader astray ------------------------------------------------------------


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


END = b"\0" * 1024


@pytest.mark.parametrize(
    "data",
    [
        header("a.jpg", 0) + header("nodot", -512) + END,
        header("a.jpg", 0) + header("b.jpg", -1024) + END,
        tar_of([("a.jpg", b"1")])[:1024]
        + b"".join(
            header("././@LongLink", 1, tarfile.GNUTYPE_LONGNAME) + b"x" * 512 for _ in range(3000)
        )
        + END,
    ],
    ids=["backwards without a key", "backwards", "names of names"],
)
def test_headers_that_make_no_sense_are_refused_in_time(data: bytes):
    with pytest.raises(ShardMismatchError, match=r"^u( |:)"):
        scan_tar(data, "u")


@pytest.mark.parametrize(
    "fields", [{"GNU.sparse.map": "q,r"}, {"size": "9" * 26}, {"GNU.sparse.size": "x"}]
)
def test_pax_fields_that_make_no_sense_are_refused(fields: dict[str, str]):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = fields
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(ShardMismatchError, match=r"^u( |:)"):
        scan_tar(buffer.getvalue(), "u")


def test_sparse_members_are_refused(tmp_path: Path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.seek(2**20)
        file.write(b"end")
    tar = tmp_path / "x.tar"
    subprocess.run(["tar", "-S", "-C", tmp_path, "-cf", tar, "a.jpg"], check=True)
    with pytest.raises(ShardMismatchError, match=r"member 'a\.jpg' is sparse"):
        scan_tar(tar.read_bytes(), "u")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused(kind: bytes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, linked in (("a.jpg", ""), ("b.jpg", "a.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind if linked else tarfile.REGTYPE, linked
            tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(ShardMismatchError, match=r"member 'b\.jpg' is a link to 'a\.jpg'"):
        scan_tar(buffer.getvalue(), "u")


def test_extensions_that_would_stand_for_something_else_in_a_sample_are_refused():
    with pytest.raises(ShardMismatchError, match="begins with '__'"):
        scan_tar(tar_of([("a.jpg", b"1"), ("a.__key__", b"b")]), "u")


@given(st.integers(0, 2**32 - 1))
def test_a_damaged_table_is_refused_whatever_pyarrow_says(seed: int):
    data = bytearray(
        members_to_parquet(scan_tar(tar_of([("a.jpg", b"1"), ("b.jpg", b"2")]), "u"), {})
    )
    random = np.random.default_rng(seed)
    for _ in range(3):
        data[random.integers(len(data))] ^= 1 << random.integers(8)
    with contextlib.suppress(ShardMismatchError):
        members_from_parquet(bytes(data))
