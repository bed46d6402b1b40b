"""Text out of files: encodings, line ends, and that every reader of the packages has this rule."""

import json
import re
from pathlib import Path

import pytest

from synthetic import files as text_files
from synthetic.files import TextError
from synthetic.fitting.run_directory import RunDirectory
from synthetic.fitting.weights_file import RunError

PACKAGES = ("synthetic", "constructions", "probes")
WORDS = "né 中文 \U0001f600\n"


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (b"\xef\xbb\xbf", "utf-8"),
        (b"\xff\xfe", "utf-16-le"),
        (b"\xfe\xff", "utf-16-be"),
    ],
)
def test_text_is_read_without_its_mark(tmp_path: Path, mark: bytes, encoding: str):
    path = tmp_path / "text"
    path.write_bytes(mark + WORDS.encode(encoding))
    assert text_files.read_text(path) == WORDS
    path.write_bytes(mark + json.dumps({"né": 1}, ensure_ascii=False).encode(encoding))
    assert text_files.parse_json(path.read_bytes()) == {"né": 1}
    path.write_bytes(mark)
    assert text_files.read_text(path) == ""
    path.write_bytes(mark * 2 + "a".encode(encoding))
    assert text_files.read_text(path) == ("\ufeffa" if mark else "a")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("né".encode("latin-1"), "byte 1 is not UTF-8"),
        (b"\xef\xbb\xbfab\xff", "byte 5 is not UTF-8"),
        (b"a\xc3", "byte 1 is not UTF-8"),  # cut off within a character
        (b"a\xed\xa0\x80", "byte 1 is not UTF-8"),  # half of a surrogate pair
        (b"a\xc0\x80", "byte 1 is not UTF-8"),  # a NUL in two bytes
        ("ab".encode("utf-16-le"), "byte 1 is a NUL"),
        ("ab".encode("utf-16-be"), "byte 0 is a NUL"),
        ("né\0".encode(), "byte 3 is a NUL"),
        (b"\xff\xfea\0b", "byte 4 is not UTF-16"),
        (b"\xff\xfea\0\0\xd8b\0", "byte 4 is not UTF-16"),
        (b"\xfe\xff\0a\0\0", "byte 4 is a NUL"),
        ("ab".encode("utf-32"), "byte 0 begins text in UTF-32"),
        (b"\0\0\xfe\xff\0\0\0a", "byte 0 begins text in UTF-32"),
    ],
)
def test_what_is_no_text_is_refused_by_its_place(tmp_path: Path, data: bytes, said: str):
    path = tmp_path / "text"
    path.write_bytes(data)
    with pytest.raises(TextError) as caught:
        text_files.read_text(path)
    rule = "must be text in UTF-8, or in UTF-16 with a byte-order mark"
    assert str(caught.value) == f"{path}: {rule}: {said}"


def test_lines_end_at_line_ends_alone():
    inside = "a\x85\u2028\u2029\x0b\x0c\x1c\x1d\x1eb"
    text = f"{inside}\r\n\rc\n\n\rd"
    assert text_files.split_lines(text) == [inside, "", "c", "", "", "d"]
    assert text_files.split_lines("a\n") == ["a", ""]
    numbers = {letter: text_files.line_number(text, text.index(letter)) for letter in "abcd"}
    assert numbers == {"a": 1, "b": 1, "c": 3, "d": 6}


def test_json_that_is_nested_too_deeply_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deeply"):
        text_files.parse_json(b"[" * 100_000)


def test_runs_are_read_by_this_rule(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.write_config("kind", {"name": "né"})
    text = run.config.read_text()
    run.config.write_bytes(text.encode("utf-16"))
    assert run.read_config("kind")["name"] == "né"
    run.config.write_bytes(text.replace("kind", "k\u00efnd").encode("latin-1"))
    with pytest.raises(RunError, match=r"config\.json: .* byte \d+ is not UTF-8"):
        run.read_config()
    run.metrics.write_bytes('\ufeff{"step": 1, "é": "\u2028"}\r\n{"step": 2}\r\n'.encode())
    assert run.records() == [{"step": 1, "é": "\u2028"}, {"step": 2}]


def test_no_package_reads_text_in_another_way():
    """Files are read as bytes, which `synthetic.files` decodes."""
    root = Path(__file__).parents[2]
    other = re.compile(r"\.read_text\(|json\.load\(")
    files = [file for package in PACKAGES for file in sorted((root / package).rglob("*.py"))]
    assert len(files) > 100
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for file in files
        if file != root / "synthetic" / "files.py"
        for line in file.read_text(encoding="utf-8").split("\n")
        if other.search(line)
    ]
    assert found == []
