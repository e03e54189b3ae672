"""Files of labels: what a column holds is decided by its cells; what is wrong is named by line."""

from pathlib import Path

import pytest

from data_pipelines.label_table import LabelTable, LabelTableError, described, read_label_table


def table(folder: Path, text: str | bytes) -> LabelTable:
    path = folder / "labels.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_label_table(path)


def labels(found: LabelTable) -> dict[str, dict]:
    return {row.image: described(found.columns, row.cells) for row in found.rows}


def test_columns_become_attributes_numbers_classes_and_the_caption(tmp_path: Path) -> None:
    found = table(
        tmp_path,
        "file,hat,celeba,truth,floats,age,kind,caption\n"
        'a.jpg,1,-1,True,1.0,3.5,cat,"A cat, asleep."\n'
        "b.jpg,0,1,false,0.0,1e1,dog,2\n",
    )
    assert labels(found) == {
        "a.jpg": {
            "attributes": {"hat": 1, "celeba": 0, "truth": 1, "floats": 1},
            "numeric": {"age": 3.5},
            "classes": {"kind": "cat"},
            "caption": "A cat, asleep.",
        },
        "b.jpg": {
            "attributes": {"hat": 0, "celeba": 1, "truth": 0, "floats": 0},
            "numeric": {"age": 10.0},
            "classes": {"kind": "dog"},
            "caption": "2",
        },
    }


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (("1", "1"), "attributes"),
        (("-1", "-1"), "attributes"),
        (("-1", "0"), "numeric"),
        (("0", "2"), "numeric"),
        (("1", "red"), "classes"),
        (("1_000", "2"), "classes"),
        (("٣", "2"), "classes"),
        (("true", "1"), "classes"),
        (("nan", "null"), "classes"),
    ],
)
def test_a_column_is_what_all_its_cells_are(tmp_path: Path, cells, kind: str) -> None:
    found = table(tmp_path, "file,c\n" + "".join(f"{i},{c}\n" for i, c in enumerate(cells)))
    assert found.columns[0].kind == kind


def test_kinds_without_a_column_are_left_out(tmp_path: Path) -> None:
    assert labels(table(tmp_path, "f,c\na,x\n")) == {"a": {"classes": {"c": "x"}}}


def test_other_peoples_editors_leave_marks_that_do_no_harm(tmp_path: Path) -> None:
    found = table(tmp_path, b"\xef\xbb\xbffile,hat\r\n./a.jpg , 1\r\n\r\nb.jpg,0\r\n")
    assert labels(found) == {
        "a.jpg": {"attributes": {"hat": 1}},
        "b.jpg": {"attributes": {"hat": 0}},
    }
    assert [row.line for row in found.rows] == [2, 4]


CELEBA = "2\n5_o_Clock_Shadow Male \n000001.jpg -1  1\n000002.jpg  1 -1\n"


def test_celebas_own_file_is_read(tmp_path: Path) -> None:
    assert labels(table(tmp_path, CELEBA)) == {
        "000001.jpg": {"attributes": {"5_o_Clock_Shadow": 0, "Male": 1}},
        "000002.jpg": {"attributes": {"5_o_Clock_Shadow": 1, "Male": 0}},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one column only"),
        ("file;hat\na;1\n", "line 1: one column only; .* after commas"),
        ("file,hat\n", "no line of labels"),
        ("file,\na,1\n", "line 1: column 2 has no name"),
        ("file,hat,hat\na,1,0\n", "line 1: two columns are called 'hat'"),
        ("file,hat\na,1\nb\n", "line 3: 1 cells where the line of names has 2"),
        ("file,hat\na,1\nb,1,0\n", "line 3: 3 cells"),
        ("file,hat\na,1\nb,\n", "line 3: nothing in column hat"),
        ("file,hat\na,1\n,1\n", "line 3: nothing in column file"),
        ("file,age\na,31\nb,nan\nc,2\n", "line 3: 'nan' in column age is no finite number"),
        ("file,age\na,31\nb,1e999\n", "line 3: '1e999' in column age is no finite number"),
        ('file,hat\na,"1\n', "line 2: no CSV"),
        ("file,hat\na,1\nb,1\0\n", "line 3: byte 0x00 is not text"),
        (b"file,hat\na,1\nb\xff,1\n", "line 3: byte 0xff is not text in UTF-8"),
        ("file,hat\na," + "x" * 200_000 + "\n", "line 2: no CSV: field larger"),
        (CELEBA[:-22], "line 1: says 2 images, and 1 lines of labels follow"),
        ("7\n", "line 1: says 7 images, and 0 lines"),
        (CELEBA.replace("  1 -1", "  1"), "line 4: 2 cells where the line of names has 3"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_line(tmp_path: Path, text, message: str) -> None:
    with pytest.raises(LabelTableError, match=message) as caught:
        table(tmp_path, text)
    assert str(tmp_path / "labels.csv") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
