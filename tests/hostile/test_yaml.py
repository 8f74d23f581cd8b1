"""Configurations that would run code, never end, or mean something else: refused by file."""

import pytest

from sparse_gpt.config_file import MAX_BYTES, load_config, parse_yaml
from sparse_gpt.experiment.spec import load_experiment

GOOD = """
data: [{path: corpus}]
seq_len: 32
micro_batch_size: 2
max_steps: 10
model: {n_layer: 2, n_head: 2, d_model: 64}
"""
TAGS = {
    "apply": 'name: !!python/object/apply:os.mkdir ["MARKER"]',
    "new": 'name: !!python/object/new:os.mkdir ["MARKER"]',
    "state": "name: !!python/object/apply:builtins.exec [\"import os; os.mkdir('MARKER')\"]",
    "module": "name: !!python/module:antigravity",
    "name": "name: !!python/name:os.system",
    "tuple": "name: !!python/tuple [1]",
    "verbatim": "name: !<tag:yaml.org,2002:python/name:os.system> x",
    "prefix": '%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nname: !os.mkdir ["MARKER"]',
    "key": "? !!python/object/apply:os.mkdir [MARKER]\n: 1",
    "binary": "name: !!binary aGk=",
    "set": "model: !!set {n_layer}",
    "omap": "model: !!omap [n_layer: 1]",
    "empty int": 'seq_len: !!int ""',
    "empty float": 'seq_len: !!float ""',
    "no bool": "seq_len: !!bool maybe",
    "no time": "seq_len: !!timestamp soon",
    "own": "name: !run x",
    "none": "name: ! x",
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("kind", TAGS)
def test_tags(file, marker, refused, kind):
    file.write_text(GOOD + TAGS[kind].replace("MARKER", str(marker)))
    if kind == "prefix":
        file.write_text(TAGS[kind].replace("MARKER", str(marker)))
    with refused(file, "a value must not have a tag" if kind != "key" else "line"):
        load_config(file)
    with refused(file, "line"):
        load_experiment(file)


def test_tags_of_overrides(file, marker, refused):
    with refused("override 'name=", "a value must not have a tag"):
        load_config(_good(file), [f"name=!!python/object/apply:os.mkdir [{marker}]"])


def _good(file):
    path = file.with_name("good.yaml")
    path.write_text(GOOD)
    return path


def _laughs(value: str, lines: int = 9, opened: str = "[", closed: str = "]") -> str:
    text = [f"a0: &a0 {opened}{value}{closed}"]
    for number in range(1, lines):
        inner = ", ".join([f"*a{number - 1}"] * 10)
        text.append(f"a{number}: &a{number} {opened}{inner}{closed}")
    return "\n".join(text)


BOMBS = {
    "lists": (_laughs("x"), "aliases"),
    "as a key": (_laughs("x") + "\n? *a8\n: 1", "keys must be text"),
    "mappings": (
        "\n".join(
            ["a0: &a0 {k: x}"]
            + [
                f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(10))}}}"
                for n in range(1, 9)
            ]
        ),
        "aliases",
    ),
    "merges": (
        "\n".join(
            ["a0: &a0 {k: x}"]
            + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
        ),
        "keys must be text, got '<<'",
    ),
    "merges of sets": (
        "\n".join(
            ["a0: &a0 !!set {k}"]
            + [f"a{n}: &a{n} !!set {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
        ),
        "a value must not have a tag",
    ),
    "a long text": (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 60)}]", "aliases"),
    "a long key": (
        f"a: &a {{{'x' * 1000}: 1}}\nb: [{', '.join(['*a'] * 6000)}]",
        "aliases",
    ),
    "itself": ("a: &a [*a]", "not valid YAML"),
    "values": (f"a: [{'1,' * 41_000}]", "more than 20000 values"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(file, refused, kind):
    text, said = BOMBS[kind]
    file.write_text(text)
    with refused(file, said, mb=300):
        load_config(file)


@pytest.mark.parametrize("opened", ["[", "{a: ", "- ", "? ", "a:\n"])
@pytest.mark.parametrize("depth", [400, 20_000])
def test_deep_nesting(file, refused, opened, depth):
    if opened == "a:\n":
        depth = min(depth, 350)
        text = "".join(f"{' ' * level}a:\n" for level in range(depth))
    else:
        text = opened * depth
    file.write_text(text)
    with refused(file, mb=64):
        load_config(file)


def test_deep_overrides(file, refused):
    with refused("good.yaml", "nested too deeply", mb=64):
        load_config(_good(file), [".".join(["a"] * 20_000) + "=1"])


NUMBERS = {
    "1e400": "finite",
    ".nan": "finite",
    "-.inf": "finite",
    "1" * 10_000: "integer string conversion",
    "0x" + "f" * 10_000: "more than 128 bits",
    "0b" + "1" * 10_000: "more than 128 bits",
    "1" + "0" * 4000: "more than 128 bits",
    "1:30": "base 60",
    "1" + ":59" * 80_000: "base 60",
    "1" + ":59" * 80_000 + ".5": "base 60",
    "0x": "lr",
    "2026-99-99": "lr",
}


@pytest.mark.parametrize("number", NUMBERS, ids=lambda text: text[:12])
def test_numbers(file, refused, number):
    file.write_text(f"{GOOD}optimizer:\n  lr: {number}\n")
    with refused(file, NUMBERS[number], mb=64):
        load_config(file)


@pytest.mark.parametrize(
    "setting",
    [
        f"seq_len: {2**63}",
        f"seed: {-(2**100)}",
        f"micro_batch_size: {2**127}",
        "model: {n_layer: 1000000000, n_head: 2, d_model: 64}",
        "ift: {member: parallel, sizes: {h.0.attn.q: 1000000000}}",
        "ift: {member: parallel}\nsparsity: {sparsity: 0.99999999}",
    ],
)
def test_sizes_that_no_machine_has(file, refused, setting):
    """Before anything is made in proportion to them."""
    key = setting.split(":")[0]
    kept = [line for line in GOOD.splitlines() if not line.startswith(f"{key}:")]
    file.write_text("\n".join([*kept, setting]))
    with refused(file, "" if "sparsity" in setting else "size" if key == "ift" else key):
        load_config(file)


def test_enormous_files(file, refused):
    file.write_text(f"name: {'x' * MAX_BYTES}")
    with refused(file, f"more than {MAX_BYTES:,} bytes"):
        load_config(file)
    with open(file, "wb") as sparse:
        sparse.truncate(2**40)
    with refused(file, "bytes are no configuration"):
        load_config(file)
    with refused("/dev/zero", "bytes are no configuration"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    "content",
    [
        b"name: a\0b",
        b"\0" * 1000,
        b'name: "a\\0b"',
        b'"a\\0b": 1',
        b'name: "\\uD800"',
        b"name: caf\xe9",
        b"\xff\xfen\0a\0m\0e\0",
        b"\xed\xa0\x80: 1",
        b"name: \x1b[31mred",
        b'name: "\\U0011FFFF"',
    ],
)
def test_what_is_no_text(file, refused, content):
    file.write_bytes(GOOD.encode() + content)
    with refused(file):
        load_config(file)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "{seed: 1, seed: 1}", 'seed: 1\n"seed": 2'])
def test_duplicate_keys(file, refused, text):
    file.write_text(text)
    with refused(file, "line", "is given twice"):
        load_config(file)


def test_many_problems_are_told_in_a_few_words(file, refused):
    """Each unknown key is compared with all known ones, and each would be named."""
    file.write_text(GOOD + "\n".join(f"{'k' * 100}{number}: 1" for number in range(2000)))
    with refused(file, "; and 1995 more", mb=64):
        load_config(file)


def test_dates_stay_dates():
    assert str(parse_yaml("2026-05-01", "here")) == "2026-05-01"
