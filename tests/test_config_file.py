"""Reading configurations: names, duplicates, numbers, overrides; never anything but UserError."""

import contextlib
import typing
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from sparse_gpt.config import RunConfig
from sparse_gpt.config_file import dump_yaml, load_config, parse_yaml, read_tree, validate
from sparse_gpt.errors import UserError

TEXT = """
data: [{path: corpus}]
seq_len: 32
micro_batch_size: 2
max_steps: 10
model: {n_layer: 2, n_head: 2, d_model: 64}
optimizer: {lr: 6e-4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def sections(
    schema: type[BaseModel] = RunConfig, prefix: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of the schema with its dotted place."""
    found: list[tuple[tuple[str, ...], type[BaseModel]]] = [(prefix, schema)]
    for name, field in schema.model_fields.items():
        kinds = (field.annotation, *typing.get_args(field.annotation))
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                many = typing.get_origin(field.annotation) is tuple
                inside = (name, "0") if many else (name,)
                found += sections(kind, prefix + inside)
    return found


SECTIONS = sections()


@pytest.mark.parametrize(("place", "schema"), SECTIONS, ids=lambda v: ".".join(v) or "top"
                         if isinstance(v, tuple) else "")  # fmt: skip
def test_a_misspelt_key_is_told_the_nearest_at_every_level(file, place, schema):
    """Each key of each section, with two letters exchanged or one lost."""
    for key in schema.model_fields:
        wrong = key[:-2] + key[-1] + key[-2] if len(set(key[-2:])) == 2 else key[:-1]
        if wrong in schema.model_fields or not wrong:
            continue
        dotted = ".".join((*place, wrong))
        with pytest.raises(UserError) as caught:
            load_config(file, [f"{dotted}=1"])
        near = [other for other in schema.model_fields if key.startswith(other)]  # head, heads
        hints = [f"{dotted}: unknown key; did you mean '{other}'?" for other in near]
        assert any(hint in str(caught.value) for hint in hints), hints


def test_sections_are_all_found():
    names = {".".join(place) for place, _ in SECTIONS}
    assert {"", "data.0", "sparsity.update", "sparsity.structure", "deepspeed"} <= names


def test_a_key_like_no_other_gets_the_list(file):
    with pytest.raises(UserError, match=r"checkpoint.zzzzzz: unknown key; known: every, keep_last"):
        load_config(file, ["checkpoint.zzzzzz=1"])


def test_numbers_with_exponents(file):
    assert load_config(file).optimizer.lr == 6e-4
    for text, value in [("1e3", 1e3), ("1E-3", 1e-3), ("+2e4", 2e4), ("-1e-4", -1e-4),
                        ("1.5e-3", 1.5e-3), ("6.e-4", 6e-4), ("1_0e2", 1000.0)]:  # fmt: skip
        assert parse_yaml(text, "here") == value
    assert parse_yaml("e4", "here") == "e4"
    assert parse_yaml("'6e-4'", "here") == "6e-4"


@pytest.mark.parametrize(
    "text",
    ["a: 1\na: 2", "x: {b: 1, b: 1}", "- {k: 1, j: 2, k: 3}", "a: 1\n'a': 2"],
)
def test_duplicate_keys_are_refused_with_their_line(text):
    with pytest.raises(UserError, match=r"f\.yaml: line \d: key '[abk]' is given twice"):
        parse_yaml(text, "f.yaml")


@pytest.mark.parametrize("text", ["1: x", "null: x", "{[1, 2]: x}", "true: x", "? {a: 1}\n: 2"])
def test_keys_are_text(text):
    with pytest.raises(UserError, match="keys must be text"):
        parse_yaml(text, "here")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [ls]",
        "!!python/name:os.system",
        "a: !!python/object:os.path {}",
        "!new [1]",
        "a: [1",
        "\t- x",
        "a: *missing",
        "%BAD",
        "&a {x: *a, [}",
        "a: \x00",
        "[" * 5000,
        "9" * 5000,
        "0x" + "f" * 5000,
        "2020-13-45",
        "1e400: 1",
    ],
)
def test_bad_yaml_is_a_user_error_and_builds_nothing(text, file):
    file.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(file)


@pytest.mark.parametrize("text", ["&a [*a]", "data: &a [*a]", "&a {data: *a}", "a: 2020-01-01",
                                  "model: 2020-01-01", "x: !!binary aGk=", "!!set {a, b}",
                                  "seq_len: 1:30:00", "- 1", "text", "3", "model: .nan",
                                  "<<: {a: 1}", "<<: 3", "{<<: [x]}"])  # fmt: skip
def test_valid_yaml_that_is_no_configuration(text, file):
    file.write_text(text)
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(file)


def test_nested_aliases_do_not_explode(file):
    """Ten lines that would expand to ten thousand million entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="aliases"):
        load_config(file)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"config file not found: .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot read config file"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UserError, match=r"cannot read config file .*latin\.yaml"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match="data: no corpus given"):
        load_config(tmp_path / "empty.yaml")


def test_overrides(file):
    config = load_config(
        file,
        ["optimizer.lr=1e-3", "sparsity.update.freq=7", "data.0.path=elsewhere", "name=a=b",
         "sparsity.structure={type: block, block: [8, 8]}", "checkpoint.allow_changed=[seed]",
         "output_dir=null"],
    )  # fmt: skip
    assert config.optimizer.lr == 1e-3
    assert config.sparsity.update.freq == 7
    assert str(config.data[0].path) == "elsewhere"
    assert config.name == "a=b"
    assert config.sparsity.structure.block == (8, 8)
    assert config.checkpoint.allow_changed == ("seed",)
    assert config.output_dir is None


@pytest.mark.parametrize("given", ["2026-12-01T12:00:00", "2026-12-01 12:00:00Z", "2026-12-01"])
def test_a_time_needs_no_quotes(file, given):
    """YAML's dates are text here, in a file as in an override."""
    assert load_config(file, [f"checkpoint.deadline={given}"]).checkpoint.deadline == given
    file.write_text(TEXT + f"checkpoint:\n  deadline: {given}\n")
    assert load_config(file).checkpoint.deadline == given


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "write key=value"),
        ("=3", "write key=value"),
        ("seq_len=", "seq_len"),
        ("seq_len.x=3", "seq_len holds no keys"),
        ("data.1.path=x", "'1' is no index of a list of 1"),
        ("data.-1.path=x", "'-1' is no index"),
        ("data.x=3", "'x' is no index"),
        ("data.\u00b2.path=x", "is no index"),
        ("a..b=1", "a: unknown key"),
        ("model.n_layer=[", "not valid YAML"),
        ("model.n_layer=true", "model.n_layer"),
        ("model=3", "model"),
        ("nmae=x", "did you mean 'name'?"),
    ],
)
def test_override_errors_name_the_override(file, override, message):
    with pytest.raises(UserError) as caught:
        load_config(file, [override])
    assert message in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6) | st.sampled_from(list(RunConfig.model_fields)), inner,
                      max_size=4),
    max_leaves=12,
)  # fmt: skip
SAFE = settings(max_examples=200, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@SAFE
@given(st.text(max_size=60) | st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(file, content):
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    with pytest.raises(UserError):  # never a whole configuration by chance
        load_config(file)


@SAFE
@given(VALUES)
def test_any_tree_is_read_or_refused(file, tree):
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError):
        load_config(file)


@SAFE
@given(st.sampled_from(SECTIONS), st.data(), VALUES)
def test_any_value_of_any_key_is_taken_or_refused(file, section, data, value):
    place, schema = section
    key = data.draw(st.sampled_from(list(schema.model_fields)))
    file.write_text(TEXT)
    tree = read_tree(file)
    target: Any = tree
    for name in place:
        target = target[int(name)] if isinstance(target, list) else target.setdefault(name, {})
    target[key] = value
    with contextlib.suppress(UserError):
        assert validate(RunConfig, tree, "here").total_steps(1) > 0


@SAFE
@given(st.text(max_size=12), st.text(max_size=12))
def test_any_override_is_taken_or_refused(file, key, value):
    file.write_text(TEXT)
    with contextlib.suppress(UserError):
        assert load_config(file, [f"{key}={value}"]).seq_len > 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ift.member=wide", "sparsity.sparsity=0.9", "sparsity.algorithm=rigl"],
        ["output_dir=some/where", "optimizer.betas=[0.8, 0.999]", "sparsity.update.stop=7"],
        ["name=1e5x", "data.0.weight=1e-7", "peak_tflops=989.5", "init_from=folder"],
        ["name='6e-4'", "name='yes'", "name='1_000'", "name=' padded '", "name='\u00e9'"],
    ],
)
def test_what_is_dumped_loads_equal(file, tmp_path, overrides):
    config = load_config(file, overrides)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(config))
    assert load_config(dumped) == config


@SAFE
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10),
    st.floats(1e-12, 1e3),
    st.integers(0, 2**70),
)
@example("0E0", 1.0, 0)
def test_any_text_and_number_survives_the_dump(file, name, lr, seed):
    file.write_text(TEXT)
    tree = read_tree(file)
    tree["name"], tree["optimizer"]["lr"], tree["seed"] = name, lr, seed
    config = validate(RunConfig, tree, "here")
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(file) == config
