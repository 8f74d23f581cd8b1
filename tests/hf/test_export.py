"""The exported folder: exact, sharded, atomic, and never in the way of other files."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, GPT2LMHeadModel

from sparse_gpt.errors import UserError
from sparse_gpt.hf import export_folder, import_folder
from sparse_gpt.model.gpt import GPT, GPTConfig

CONFIG = GPTConfig(
    n_layer=2,
    n_head=2,
    d_model=8,
    d_ff=20,
    vocab_size=17,
    n_positions=6,
    activation="gelu_new",
    dropout=0.25,
    layer_norm_epsilon=1e-6,
    init_std=0.03,
)


def model(seed: int = 0) -> GPT:
    gpt = GPT(CONFIG)
    torch.manual_seed(seed)
    for parameter in gpt.parameters():
        parameter.data.normal_()
    return gpt


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 2000, 1])
def test_round_trip_is_bitwise(tmp_path, max_shard_bytes):
    gpt = model()
    export_folder(
        gpt.get_parameter, CONFIG, tmp_path / "a", eos_id=3, max_shard_bytes=max_shard_bytes
    )
    config, parameters = import_folder(tmp_path / "a")
    assert config == CONFIG
    assert parameters.keys() == dict(gpt.named_parameters()).keys()
    for name, parameter in gpt.named_parameters():
        assert torch.equal(parameters[name], parameter)
        assert parameters[name].is_contiguous()
    sharded = "model.safetensors.index.json" in files(tmp_path / "a")
    assert sharded == (max_shard_bytes < 10**9)


def test_shards_load_in_transformers_and_respect_the_limit(tmp_path):
    gpt = model()
    export_folder(gpt.get_parameter, CONFIG, tmp_path / "a", max_shard_bytes=2000)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "a").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(theirs(ids).logits, gpt.eval()(ids), rtol=1e-5, atol=1e-5)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    size = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "a" / file, "pt") as handle:
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
        assert sum(sizes) <= 2000 or len(sizes) == 1
        size += sum(sizes)
    assert size == index["metadata"]["total_size"] == sum(p.nbytes for p in gpt.parameters())


def test_bfloat16_rounds_once(tmp_path):
    gpt = model()
    export_folder(gpt.get_parameter, CONFIG, tmp_path / "a", dtype="bfloat16")
    _, parameters = import_folder(tmp_path / "a")
    for name, parameter in gpt.named_parameters():
        assert torch.equal(parameters[name], parameter.bfloat16().float())
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "a", dtype="auto").dtype == torch.bfloat16


def test_the_config_as_transformers_reads_it(tmp_path):
    export_folder(model().get_parameter, CONFIG, tmp_path / "a", eos_id=3)
    config = AutoConfig.from_pretrained(tmp_path / "a")
    assert (config.n_layer, config.n_head, config.n_embd, config.n_inner) == (2, 2, 8, 20)
    assert (config.n_positions, config.vocab_size) == (6, 17)
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-6
    assert config.initializer_range == 0.03
    assert config.attn_pdrop == config.embd_pdrop == config.resid_pdrop == 0.25
    assert config.tie_word_embeddings is True
    assert config.bos_token_id == config.eos_token_id == 3
    assert config.architectures == ["GPT2LMHeadModel"]


def test_metadata_is_written_beside(tmp_path):
    export_folder(model().get_parameter, CONFIG, tmp_path / "a", metadata={"step": 7})
    assert json.loads((tmp_path / "a" / "sparse_gpt.json").read_text()) == {"step": 7}


def test_one_parameter_at_a_time(tmp_path):
    """The writer asks for each parameter once, when it writes it."""
    gpt, asked = model(), []

    def parameter(name):
        asked.append(name)
        return gpt.get_parameter(name)

    export_folder(parameter, CONFIG, tmp_path / "a")
    assert sorted(asked) == sorted(name for name, _ in gpt.named_parameters())


def test_a_failure_leaves_nothing(tmp_path):
    def parameter(name):
        if name == "h.1.attn.k.weight":
            raise RuntimeError("disk gone")
        return model().get_parameter(name)

    with pytest.raises(RuntimeError, match="disk gone"):
        export_folder(parameter, CONFIG, tmp_path / "a")
    assert files(tmp_path) == []


def test_a_failure_keeps_the_old_folder(tmp_path):
    export_folder(model().get_parameter, CONFIG, tmp_path / "a", metadata={"n": 1})

    def parameter(name):
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        export_folder(parameter, CONFIG, tmp_path / "a", overwrite=True)
    assert files(tmp_path) == ["a"]
    assert import_folder(tmp_path / "a")[0] == CONFIG


def test_what_a_killed_export_left_is_cleared(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "model.safetensors").write_text("half")
    export_folder(model().get_parameter, CONFIG, tmp_path / "a")
    assert files(tmp_path) == ["a"]


def test_overwrite(tmp_path):
    export_folder(model(0).get_parameter, CONFIG, tmp_path / "a")
    with pytest.raises(UserError, match=r"--out .*a is not empty; .* --overwrite"):
        export_folder(model(1).get_parameter, CONFIG, tmp_path / "a")
    export_folder(model(1).get_parameter, CONFIG, tmp_path / "a", overwrite=True)
    _, parameters = import_folder(tmp_path / "a")
    assert torch.equal(parameters["wte.weight"], model(1).wte.weight)
    assert files(tmp_path) == ["a"]


def test_a_folder_that_is_no_export_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years")
    with pytest.raises(UserError, match="was not exported by this program"):
        export_folder(model().get_parameter, CONFIG, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    export_folder(model().get_parameter, CONFIG, tmp_path / "a")
    assert import_folder(tmp_path / "a")[0] == CONFIG


def test_bad_requests(tmp_path, monkeypatch):
    get = model().get_parameter
    with pytest.raises(UserError, match="--dtype: 'int8' is none of float32, bfloat16"):
        export_folder(get, CONFIG, tmp_path / "a", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export_folder(get, CONFIG, tmp_path / "file")
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        export_folder(get, CONFIG, tmp_path / "a", tokenizer_path=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 100}))
    with pytest.raises(UserError, match="needs 6,144 bytes and the disk has 100 free"):
        export_folder(get, CONFIG, tmp_path / "a")
    assert files(tmp_path) == ["file"]
