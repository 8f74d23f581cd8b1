"""Which run of a grid was chosen: a fine-tuning with `lr_grid` has one in each `lr-*`."""

import re
from pathlib import Path

from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_object

FILE = "results.json"


def rate_folders(folder: Path) -> list[Path]:
    """The runs of a grid, by name; empty for the folder of a single run."""
    return sorted(path for path in folder.glob("lr-*") if path.is_dir())


def chosen_run(folder: Path) -> Path | None:
    """The run that `results.json` names as the best of a grid; None where it names none.

    Raises `UserError` for a file that cannot be read, or that names no folder beside it. That of
    a single run is left alone: it says nothing of checkpoints.
    """
    if not rate_folders(folder):
        return None
    file = folder / FILE
    try:
        name = read_object(file).get("run")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: not JSON ({error}); move it away and start the fine-tuning again, or give "
            "the folder of a learning rate"
        ) from None
    if name is None:  # of a fine-tuning without a grid, in the same folder
        return None
    if not isinstance(name, str) or not re.fullmatch(r"lr-[0-9.e+-]{1,30}", name):
        raise UserError(f"{file}: run: {str(name)[:80]!r} is no folder of a learning rate")
    return folder / name


def check_chosen(folder: Path) -> None:
    """Raise `UserError` where there is nothing but the runs of a grid, and none was chosen."""
    rates = [path for path in rate_folders(folder) if (path / "checkpoints").is_dir()]
    if rates:
        raise UserError(
            f"no checkpoint at {folder}: it holds a run for each learning rate of lr_grid, and no "
            f"{FILE} says which is the best; start the fine-tuning again to finish it, or give one "
            f"of them, such as {rates[0]}"
        )
