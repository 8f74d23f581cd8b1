"""From YAML and dotted overrides to a validated configuration object.

Unknown keys are errors that name the nearest known key; types are strict (`n_layer: true` is
refused); duplicate YAML keys are refused; `6e-4` is a number.
"""

import difflib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sparse_gpt.config import RunConfig
from sparse_gpt.errors import UserError

MAX_VALUES = 100_000  # in one file; a configuration has a few hundred

Schema = typing.TypeVar("Schema", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `6e-4` as a number and refuses duplicate keys."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{_where(key_node)}: keys must be text, got {key!r}")
        if key in seen:
            raise UserError(f"{_where(key_node)}: key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _where(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, where: str) -> Any:
    """YAML without tags that build objects; errors become a `UserError` naming `where`."""
    try:
        tree = yaml.load(text, Loader=_Loader)
        _expanded_size(tree, {})
        return tree
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _expanded_size(tree: Any, known: dict[int, int]) -> int:
    """Values in a tree with every alias written out; refuses absurd and endless ones."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        known[id(tree)] = MAX_VALUES + 1  # what a list or mapping that holds itself comes to
        children = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_expanded_size(child, known) for child in children)
    if known[id(tree)] > MAX_VALUES:
        raise UserError(f"aliases (*name) expand to more than {MAX_VALUES} values")
    return known[id(tree)]


def load_config(path: Path | str, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides, validate.

    Raises `UserError` for a missing file, bad YAML, an unknown key (with the nearest known one),
    a wrong type or values that do not fit each other.
    """
    return validate(RunConfig, read_tree(path, overrides), str(path))


def read_tree(path: Path | str, overrides: tuple[str, ...] | list[str] = ()) -> dict[str, Any]:
    """The raw tree of a YAML file with the overrides applied, not yet validated."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys, got {type(tree).__name__}")
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise UserError(f"override {override!r}: write key=value, e.g. optimizer.lr=6e-4")
        set_key(tree, key.split("."), parse_yaml(value, f"override {override!r}"), override)
    return tree


def set_key(tree: Any, keys: list[str], value: Any, override: str) -> None:
    """Set a nested value, making the mappings on its way; `override` is named in errors."""
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(tree, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(tree):
                raise UserError(
                    f"override {override!r}: {key!r} is no index of a list of {len(tree)}"
                )
            index: Any = int(key)
        elif isinstance(tree, dict):
            index = key
        else:
            raise UserError(f"override {override!r}: {'.'.join(keys[:position])} holds no keys")
        if last:
            tree[index] = value
        else:
            if isinstance(tree, dict) and tree.get(index) is None:
                tree[index] = {}
            tree = tree[index]


def validate(schema: type[Schema], tree: dict[str, Any], where: str) -> Schema:
    """Strict validation of a tree; every problem is named in one `UserError`."""
    try:
        # Through JSON: strict, yet a list is a tuple and a text is a path.
        return schema.model_validate_json(json.dumps(tree, allow_nan=True))
    except ValidationError as error:
        lines = [_explain(problem, schema) for problem in error.errors(include_url=False)]
        raise UserError(f"{where}: " + "; ".join(lines)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def construct(schema: type[Schema], where: str, **fields: Any) -> Schema:
    """Build a section from Python values; what does not fit together is a `UserError`."""
    try:
        return schema(**fields)
    except ValidationError as error:
        lines = [_explain(problem, schema) for problem in error.errors(include_url=False)]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(schema, problem["loc"][:-1])
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
        return f"{location}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = repr(problem["input"])
    got = f" (got {shown})" if problem["type"] != "value_error" and len(shown) < 60 else ""
    return f"{location}: {message}{got}" if location else f"{message}{got}"


def _known_keys(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = schema
    for part in location:
        if isinstance(part, str) and _is_section(current) and part in current.model_fields:
            current = _inner(current.model_fields[part].annotation)
    return list(current.model_fields) if _is_section(current) else []


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _inner(annotation: Any) -> Any:
    """The section inside `Section`, `tuple[Section, ...]` or `Section | None`."""
    if isinstance(annotation, types.GenericAlias | types.UnionType):
        return next((arg for arg in typing.get_args(annotation) if _is_section(arg)), annotation)
    return annotation


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    tree = json.loads(config.model_dump_json())
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)
