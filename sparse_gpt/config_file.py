"""From YAML and dotted overrides to a validated configuration object.

Unknown keys are errors that name the nearest known key; types are strict (`n_layer: true` is
refused); duplicate YAML keys are refused; `6e-4` is a number.

A file may come from anywhere. It holds text, numbers, lists and mappings, nothing with a tag, and
what it comes to with its aliases written out is bounded, as are its size and its numbers.
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

MAX_BYTES = 1 << 18  # of one file; a configuration has a few thousand
MAX_VALUES = 20_000  # in one file; a configuration has a few hundred
MAX_DEPTH = 100  # of values in values
LETTERS = 100  # so many letters of a text count as one value more
MAX_BITS = 128  # of an integer
MAX_PROBLEMS = 5  # named in one error

Schema = typing.TypeVar("Schema", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """SafeLoader of plain values: `6e-4` is a number; tags and duplicate keys are refused."""

    events = 0

    def get_event(self) -> Any:
        event: Any = super().get_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(f"{_where(event)}: {tag[:60]!r}: a value must not have a tag")
        self.events += 1
        if self.events > 2 * MAX_VALUES:  # lists and mappings have an end, too
            raise UserError(f"{_where(event)}: more than {MAX_VALUES} values")
        return event

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner looks ahead, in a time that grows with the square of what is open.
        if self.flow_level >= MAX_DEPTH:
            raise UserError(f"line {self.line + 1}: nested too deeply")
        super().fetch_flow_collection_start(TokenClass)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag != _TEXT:
            # The node's own text: a key that is built may be a tree of aliases without end.
            shown = repr(key_node.value[:60]) if key_node.id == "scalar" else f"a {key_node.id}"
            raise UserError(f"{_where(key_node)}: keys must be text, got {shown}")
        key = _text(loader, key_node)
        if key in seen:
            raise UserError(f"{_where(key_node)}: key {key[:60]!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_yaml_str(node)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{_where(node)}: {text[:60]!r}: NUL and lone surrogates are no text")
    return text


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    _refuse_base_60(node)
    number = loader.construct_yaml_int(node)
    if number.bit_length() > MAX_BITS:
        raise UserError(f"{_where(node)}: an integer of more than {MAX_BITS} bits")
    return number


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    _refuse_base_60(node)
    return loader.construct_yaml_float(node)


def _refuse_base_60(node: yaml.ScalarNode) -> None:
    if ":" in node.value:  # YAML 1.1 reads 1:30 as 90
        raise UserError(
            f"{_where(node)}: {node.value[:60]} would be a number to the base 60; put it in quotes"
        )


def _where(place: Any) -> str:
    """The line of a node or an event."""
    return f"line {place.start_mark.line + 1}"


_TEXT = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
_Loader.yaml_implicit_resolvers = {  # without dates, which are text
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(_TEXT, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


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
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:500]}") from None


def _expanded_size(tree: Any, known: dict[int, int]) -> int:
    """Values in a tree with every alias written out; refuses absurd and endless ones."""
    if not isinstance(tree, dict | list):
        return 1 + (len(tree) // LETTERS if isinstance(tree, str) else 0)
    if id(tree) not in known:
        known[id(tree)] = MAX_VALUES + 1  # what a list or mapping that holds itself comes to
        children = [*tree.keys(), *tree.values()] if isinstance(tree, dict) else tree
        known[id(tree)] = sum(_expanded_size(child, known) for child in children)
    if known[id(tree)] > MAX_VALUES:
        raise UserError(
            f"more than {MAX_VALUES} values (or as many times {LETTERS} letters), with aliases "
            "(*name) written out"
        )
    return 1 + known[id(tree)]


def load_config(path: Path | str, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Read a YAML file, apply `dotted.key=value` overrides, validate.

    Raises `UserError` for a missing file, bad YAML, an unknown key (with the nearest known one),
    a wrong type or values that do not fit each other.
    """
    return validate(RunConfig, read_tree(path, overrides), str(path))


def read_tree(path: Path | str, overrides: tuple[str, ...] | list[str] = ()) -> dict[str, Any]:
    """The raw tree of a YAML file with the overrides applied, not yet validated."""
    try:
        with open(path, "rb") as file:  # may be a pipe
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes are no configuration")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"config file not found: {path}") from None
    except (OSError, ValueError) as error:
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
        raise UserError(f"{where}: {_explained(error, schema)}") from None
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def construct(schema: type[Schema], where: str, **fields: Any) -> Schema:
    """Build a section from Python values; what does not fit together is a `UserError`."""
    try:
        return schema(**fields)
    except ValidationError as error:
        raise UserError(f"{where}: {_explained(error, schema)}") from None


def _explained(error: ValidationError, schema: type[BaseModel]) -> str:
    """Its problems in words, the first few of many."""
    problems = error.errors(include_url=False)
    lines = [_explain(problem, schema) for problem in problems[:MAX_PROBLEMS]]
    more = len(problems) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _explain(problem: Any, schema: type[BaseModel]) -> str:
    location = ".".join(str(part)[:80] for part in problem["loc"])
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
