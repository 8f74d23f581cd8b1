"""What cannot be removed from the folder of the checkpoints ends no run, and is tried again."""

import errno
import os
from unittest import mock

import pytest

from sparse_gpt.errors import UserError
from sparse_gpt.train import checkpoint_folder
from sparse_gpt.train.checkpoint_files import list_steps, step_folder
from sparse_gpt.train.checkpoint_folder import ID, CheckpointFolder, Unconfirmed
from tests.crash.runs import folder_names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "CheckpointReader", lambda path: None)
    return CheckpointFolder(tmp_path)


def put(folder, name, content="whole"):
    path = folder.path / name
    path.mkdir()
    (path / "file").write_text(content)
    return path


def save(folder, step, content="whole", keep_last=1):
    folder.ready()
    name = step_folder(step)
    temporary, final = put(folder, f"{name}.tmp", content), folder.path / name
    folder.retire(final, folder.publish(temporary, final), keep_last)


def published(folder):
    """Content by step."""
    steps = list_steps(folder.path)
    return {s: (folder.path / step_folder(s) / "file").read_text() for s in steps}


def refusing(function, number, *parts):
    """`os.<function>` fails where the path, or a name in it, has one of `parts`."""
    inner = getattr(os, function)

    def call(path, *args, dir_fd=None, **kwargs):
        where = os.fspath(path)
        if dir_fd is not None:
            where = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), where)
        if any(part in where for part in parts):
            raise OSError(number, os.strerror(number), where)
        return inner(path, *args, **({} if dir_fd is None else {"dir_fd": dir_fd}), **kwargs)

    return mock.patch.object(os, function, call)


@pytest.mark.parametrize(
    ("function", "number"),
    [("rmdir", errno.ENOTEMPTY), ("unlink", errno.EBUSY), ("rename", errno.EACCES)],
)
def test_an_old_one_that_stays_is_said_once_and_goes_later(folder, caplog, function, number):
    """Such as one with a file that is open on another machine of an NFS."""
    save(folder, 1)
    stuck = step_folder(1)
    with refusing(function, number, stuck):
        for step in (2, 3, 4):
            save(folder, step)
            assert published(folder)[step] == "whole"
            assert set(published(folder)) <= {1, step}
            assert [path for path in folder.path.iterdir() if stuck in path.name]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (str(folder.path), stuck, os.strerror(number)):
        assert part in record.getMessage()
    save(folder, 5)
    assert folder_names(folder.path) == [step_folder(5)]
    assert len(caplog.records) == 1


def test_an_id_that_was_removed_is_given_again_where_checkpoints_are_there(folder):
    save(folder, 1)
    given = (folder.path / ID).read_bytes()
    (folder.path / step_folder(1) / "manifest.json").touch()
    (folder.path / ID).unlink()
    save(folder, 2)
    assert (folder.path / ID).read_bytes() == given and published(folder) == {2: "whole"}
    (folder.path / ID).unlink()  # and now there is no checkpoint, as far as it can be seen
    for refused in (folder.ready, lambda: folder.newest("step")):
        with pytest.raises(UserError, match="it was there before and is gone"):
            refused()
    (folder.path / ID).write_bytes(b"of another folder")
    with pytest.raises(UserError, match="it was there before and is gone"):
        folder.ready()


def test_a_start_finds_what_cannot_be_removed(folder, caplog):
    """Left of a killed save of step 2, which is saved now in spite of it."""
    save(folder, 1)
    put(folder, f"{step_folder(2)}.tmp", "torn")
    with refusing("rmdir", errno.ENOTEMPTY, step_folder(2)):
        for step in (2, 3, 2):
            save(CheckpointFolder(folder.path), step, keep_last=9)
            assert published(folder)[step] == "whole"
    assert len(caplog.records) == 3  # once a start
    save(folder, 4)
    assert folder_names(folder.path) == [step_folder(4)]


def test_what_was_half_removed_never_gets_its_name_back(folder, caplog):
    """Not even where names cannot be exchanged, and it waits to be put back by its name."""
    save(folder, 1)
    save(folder, 2, "first", keep_last=2)
    with (
        mock.patch.object(checkpoint_folder, "exchange", side_effect=OSError(errno.EINVAL, "no")),
        refusing("rmdir", errno.ENOTEMPTY, step_folder(2)),
    ):
        save(folder, 2, "second", keep_last=2)
        assert published(folder) == {1: "whole", 2: "second"}
        (folder.path / step_folder(2)).rename(folder.path / "moved away")
        assert CheckpointFolder(folder.path).newest("step") == folder.path / step_folder(1)
    assert len(caplog.records) == 1


def failing_fsync(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_the_disk_did_not_confirm_replaces_nothing_for_good(folder, caplog, exchanges):
    save(folder, 1)
    save(folder, 2, "first", keep_last=2)
    final = folder.path / step_folder(2)
    temporary = put(folder, f"{final.name}.tmp", "second")
    inner = checkpoint_folder.exchange if exchanges else mock.Mock(side_effect=OSError())
    with (
        mock.patch.object(checkpoint_folder, "exchange", inner),
        mock.patch.object(checkpoint_folder, "fsync_path", failing_fsync),
    ):
        with pytest.raises(Unconfirmed, match=r"step-00000002 is published, but .*Input/output"):
            folder.publish(temporary, final)
        assert published(folder) == {1: "whole", 2: "second"}
        folder.ready()  # the disk is still as it was: nothing goes
        assert "first" in [path.read_text() for path in folder.path.glob("*.tmp/file")]
    assert len(caplog.records) == 1
    again = CheckpointFolder(folder.path)
    again.ready()
    assert published(again) == {1: "whole", 2: "second"}
    assert len(folder_names(folder.path)) == 2


def test_the_replaced_one_comes_back_where_its_unconfirmed_successor_is_moved_away(folder):
    save(folder, 2, "first")
    final = folder.path / step_folder(2)
    temporary = put(folder, f"{final.name}.tmp", "second")
    with (
        mock.patch.object(checkpoint_folder, "fsync_path", failing_fsync),
        pytest.raises(Unconfirmed, match=r"kept as step-00000002\.replaced\.tmp"),
    ):
        folder.publish(temporary, final)
    final.rename(folder.path / "broken")
    assert CheckpointFolder(folder.path).newest("step") == final
    assert published(folder) == {2: "first"}


def test_a_name_that_cannot_be_given_back_is_said(folder):
    save(folder, 2, "first")
    final = folder.path / step_folder(2)
    temporary = put(folder, f"{final.name}.tmp", "second")
    inner, seen = os.rename, []

    def only_once(source, target):
        seen.append(source)
        if len(seen) > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        inner(source, target)

    with (
        mock.patch.object(checkpoint_folder, "exchange", side_effect=OSError()),
        mock.patch.object(os, "rename", only_once),
        pytest.raises(UserError, match=r"step-00000002\.replaced\.tmp is step-00000002, and"),
    ):
        folder.publish(temporary, final)
    assert len(seen) == 3
    again = CheckpointFolder(folder.path)
    again.ready()
    assert published(again) == {2: "first"}
