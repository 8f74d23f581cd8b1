"""Options of an evaluation from a YAML file, and the checks all evaluation commands share."""

import argparse
import difflib
from pathlib import Path
from typing import Any

from sparse_gpt.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv`, taking defaults from the YAML file that `--settings` names.

    The file maps long flag names (`batch_size: 16` or `batch-size: 16`) to values; flags on the
    command line win. Raises `UserError` for an unknown key, with the nearest known one.
    """
    parser.add_argument(
        "--settings", type=Path, metavar="YAML", help="read options from a file (configs/eval)"
    )
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--settings", type=Path)
    early, _ = finder.parse_known_args(argv)
    if early.settings is not None:
        parser.set_defaults(**_defaults(parser, early.settings))
    return parser.parse_args(argv)


def _defaults(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    # Imported late: it brings torch, and with it libraries that read the environment once.
    from sparse_gpt.config_file import read_tree

    actions = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "settings")
    }
    values = {}
    for key, value in read_tree(path).items():
        if value is None:
            continue
        name = key.replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(actions))}"
            raise UserError(f"{path}: {key}: unknown key; {hint}")
        values[name] = _convert(actions[name], value, f"{path}: {key}")
    return values


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """A YAML value as the flag would have parsed it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, got {value!r}")
        return value
    many = isinstance(value, list)
    if many and action.nargs not in ("+", "*"):
        raise UserError(f"{where}: expected one value, got a list")
    convert = action.type if callable(action.type) else str
    try:
        converted = [convert(str(item)) for item in (value if many else [value])]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{where}: {error}") from None
    for item in converted:
        if action.choices is not None and item not in action.choices:
            raise UserError(f"{where}: {item!r} is none of {', '.join(map(str, action.choices))}")
    return converted if action.nargs in ("+", "*") else converted[0]


def positive(flag: str, value: int | None) -> None:
    """Refuse a count that is given and is not at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{flag} must be at least 1, got {value}")


def nearest(kind: str, name: str, known: list[str]) -> UserError:
    """The error for an unknown name: the nearest known one, and all of them."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
