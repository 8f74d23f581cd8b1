"""Lines of a log: each whole or known to be too long, however the file ends."""

import pytest

from sparse_gpt.json_file import read_lines, read_objects


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_up_to_a_length(tmp_path, end):
    path = tmp_path / "log"
    lines = [b"a" * 8, b"", b"b" * 9, b"c" * 18, b"d" * 27, b"e" * 80, b"f"]
    path.write_bytes(b"\n".join(lines) + end)
    assert list(read_lines(path, 8)) == [line[:9] for line in lines]
    path.write_bytes(b"\n".join(lines[:6]) + end)
    assert list(read_lines(path, 8)) == [line[:9] for line in lines[:6]]
    path.write_bytes(end)
    assert list(read_lines(path, 8)) == [b""] * len(end)


def test_objects_are_read_up_to_the_line_that_is_none(tmp_path):
    path = tmp_path / "log"
    for bad, why in ((b"3", "line 3: a int"), (b" " * 21, "line 3 has more than the 20 bytes")):
        path.write_bytes(b'{"a": 1}\n{"a": 2}\n' + bad + b'\n{"a": 3}\n')
        read = []
        with pytest.raises(ValueError, match=why):
            read.extend(record["a"] for record in read_objects(path, 20))
        assert read == [1, 2]


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(ValueError, match="no regular file"):
        list(read_lines(tmp_path))
