"""The folder that a preparation makes: built beside its place, then put there by renaming.

Nothing is deleted but what a preparation wrote: its own unfinished work, what a dead one left,
and, where the user asked for it, the prepared folder that the new one replaces. A killed
preparation leaves the old data where it is; killed in the instant between the two renames of
the exchange, it leaves it beside, and the next preparation puts it back.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_gpt.data.shard_index import FORMAT, INDEX_FILE, TOKENIZER_FOLDER
from sparse_gpt.data.tokenizer import CANONICAL_FILES, SENTENCEPIECE_FILE
from sparse_gpt.durable import fsync_path
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json

_OWN_FILE = re.compile(
    r"[a-z][a-z0-9_]*-\d{5}\.bin|[a-z][a-z0-9_]*\.doc\.(npy|tmp)|index\.json(\.tmp)?"
    r"|[a-z][a-z0-9_]*\.documents\.zst"
)


@contextmanager
def building(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new empty folder to build in, which becomes `out` when the block ends without an error.

    On an error it is removed and `out` stays as it was. Beside `out` it is on the same disk, so
    the exchange is two renames; until then old and new data both take room.
    Raises UserError where `out` is anything but absent, an empty folder, or (with overwrite) a
    prepared folder with nothing else in it; checked at the start and again before the exchange.
    """
    place = Path(os.path.realpath(out))  # a link to another disk stays, and leads to the data
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: {error.filename} is a file, not a folder") from error
    _clear_remains(place)
    _check_place(out, place, overwrite)
    folder = place.with_name(f"{place.name}.tmp-{_this_process()}")
    folder.mkdir()
    try:
        yield folder
        _check_place(out, place, overwrite)
        old = _exchange(folder, place)
    except BaseException:
        if folder.exists():
            shutil.rmtree(folder)
        raise
    if old is not None:
        try:
            _delete_data(old)
        except OSError as error:
            raise UserError(
                f"--out {out} holds the new data, but the old data in {old} could not be deleted "
                f"({error}); delete it"
            ) from error


def _this_process() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    # Process numbers say nothing across machines (and containers) that share a disk.
    return platform.node() or "localhost"


def _check_place(out: Path, place: Path, overwrite: bool) -> None:
    if not place.exists():
        return
    if not place.is_dir():
        raise UserError(f"--out {out} is not a folder")
    if place.is_mount():
        raise UserError(
            f"--out {out} is where a disk is mounted, which cannot be exchanged as a whole; give "
            "a folder inside it"
        )
    names = sorted(path.name for path in place.iterdir())
    if not names:
        return
    if not _has_index(place):
        raise UserError(
            f"--out {out} holds other files ({names[0]}) and no {INDEX_FILE} of prepared data; "
            "choose another folder"
        )
    if not overwrite:
        raise UserError(f"--out {out} holds prepared data; add --overwrite or choose another")
    foreign = _foreign(place)
    if foreign is not None:
        raise UserError(
            f"--out {out} holds other files ({foreign}) beside the prepared data, which "
            "--overwrite would delete; move them or choose another folder"
        )


def _has_index(folder: Path) -> bool:
    """Whether its index.json is one of prepared data, of whatever version."""
    try:
        raw = read_json(folder / INDEX_FILE)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _foreign(folder: Path) -> str | None:
    """The first thing in a folder that no preparation writes, None where there is none."""
    for path in sorted(folder.iterdir()):
        if path.name == TOKENIZER_FOLDER and path.is_dir() and not path.is_symlink():
            for file in sorted(path.iterdir()):
                if file.name not in (*CANONICAL_FILES, SENTENCEPIECE_FILE) or not file.is_file():
                    return f"{TOKENIZER_FOLDER}/{file.name}"
        elif not _OWN_FILE.fullmatch(path.name) or path.is_dir():
            return path.name
    return None


def _exchange(folder: Path, place: Path) -> Path | None:
    """Give the finished folder its name; returns where the data that it replaces is now."""
    fsync_path(folder)
    old = None
    if place.exists() and any(place.iterdir()):
        old = place.with_name(f"{place.name}.old-{_this_process()}")
        place.rename(old)
    try:
        folder.rename(place)
    except BaseException:
        if old is not None:
            old.rename(place)
        raise
    fsync_path(place.parent)
    return old


def _delete_data(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()  # first: what is left when killed here is no data
    shutil.rmtree(folder)


def _clear_remains(place: Path) -> None:
    """Delete what dead preparations of this folder left beside it, or put back what they moved.

    Only folders with nothing but a preparation's files count. Those of other machines may be in
    use: they are named on stderr and stay.
    """
    name = re.compile(re.escape(place.name) + r"\.(tmp|old)-(.+)-(\d+)")
    for path in sorted(place.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or _foreign(path) is not None:
            continue
        kind, host, number = match.groups()
        if host != _host():
            print(
                f"note: {path} was left by, or is in use by, a preparation on {host}; delete it if "
                "none runs there",
                file=sys.stderr,
            )
        elif _runs(int(number)):
            continue
        elif kind == "old" and _has_index(path) and not place.exists():
            path.rename(place)
            print(f"note: put back {place}, which a killed preparation moved", file=sys.stderr)
        else:
            shutil.rmtree(path)


def _runs(number: int) -> bool:
    """Whether another process of that number runs; what carries our own number is not ours."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
