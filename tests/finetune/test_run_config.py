"""The training run behind a fine-tuning has the checkpoint's model."""

from sparse_gpt.config_file import validate
from sparse_gpt.finetune.config import FinetuneConfig
from sparse_gpt.finetune.run_config import run_config
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.sparse_units import solve
from sparse_gpt.train.checkpoint_files import open_checkpoint
from tests.hf.checkpoints import write_run


def test_a_projected_head_stays(corpus, tmp_path):
    gpt = GPTConfig(2, 2, 16, 40, vocab_size=257, n_positions=48, d_embed=8)
    model = GPT(gpt)
    model.init_weights(1)
    source = open_checkpoint(write_run(tmp_path, model))
    tree = {"checkpoint": str(tmp_path), "data": [{"path": str(corpus)}], "max_steps": 3}
    run = run_config(validate(FinetuneConfig, tree, "test"), source, 1)
    assert run.gpt_config(257, solve(run, 257).dims) == gpt
