"""Small pretraining and fine-tuning runs in one rank, watched from inside."""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from sparse_gpt.errors import EXIT_STOPPED, Stopped, UserError
from sparse_gpt.finetune import spdf
from sparse_gpt.finetune import tune as tuning
from sparse_gpt.finetune.spdf import finetune
from sparse_gpt.hf.checkpoint import export_checkpoint
from sparse_gpt.train import signals
from sparse_gpt.train.loop import Trainer
from sparse_gpt.train.optim import optimizer_steps
from tests.contracts.runs import assemble, run_config, trainer
from tests.ranks import cleanup_engine


def pretrain(corpus: str, out: str, changes: dict[str, Any]) -> float:
    """A sparse run of a few steps; returns its validation loss over the whole split."""
    with trainer(run_config(corpus, out, **changes)) as made:
        made.fit()
        return made.evaluate("val").loss


def export(run: str, out: str) -> int:
    """Export a run as a Hugging Face folder; returns the step exported."""
    return export_checkpoint(run, out).step


def tensors(made: Trainer, kind: str) -> dict[str, torch.Tensor]:
    """The fp32 masters or a moment by parameter name, at one rank."""
    found = {}
    for name in made.shards.parameters:
        fragment = made.shards.fragment(name)
        assert fragment is not None
        found[name] = assemble(made, name, fragment.tensors()[kind]).clone()
    return found


def tune(corpus: str, out: str, checkpoint: str, overrides: list[str]) -> dict[str, Any]:
    """`finetune` by a config file; what it returned, and what its Trainer held at step 1.

    A `UserError` is returned as `{"error": message}`. `before`: just before the first optimizer
    step, after the dry run.
    """
    seen: dict[str, Any] = {"said": [], "before": None}

    class Watched(Trainer):
        def fit(self) -> Any:
            seen["trainer"] = self
            say = self.metrics.say
            self.metrics.say = lambda message: (seen["said"].append(message), say(message))[1]
            return super().fit()

        def _step(self, step: int, batches: Any) -> Any:
            if seen["before"] is None:
                seen["before"] = {
                    "loss": self.evaluate("val").loss if self.has_validation else None,
                    "weights": tensors(self, "master"),
                    "moments": [
                        tensor.abs().max().item()
                        for kind in ("exp_avg", "exp_avg_sq")
                        for tensor in tensors(self, kind).values()
                    ],
                    "optimizer_steps": optimizer_steps(self.shards.base_optimizer),
                }
            return super()._step(step, batches)

        def close(self) -> None:
            self.metrics.close()
            seen["weights"] = tensors(self, "master")
            engine = self.engine
            for name in ("engine", "optimizer", "shards", "controller", "checkpointer"):
                delattr(self, name)
            cleanup_engine(engine)

    with ExitStack() as stack:
        # The pool's process group must outlive the run.
        stack.enter_context(mock.patch.object(spdf.dist, "destroy_process_group"))
        stack.enter_context(mock.patch.object(tuning, "Trainer", Watched))
        try:
            results = finetune(_config(corpus, out, checkpoint), overrides)
        except UserError as problem:
            return {"error": str(problem), "started": "trainer" in seen}
    del seen["trainer"]
    return {"results": results, **seen}


def results_of(
    corpus: str, out: str, checkpoint: str, overrides: list[str]
) -> dict[str, Any] | str:
    """What `finetune` returned, at any number of ranks; the message of a `UserError`."""
    with mock.patch.object(spdf.dist, "destroy_process_group"):
        try:
            return finetune(_config(corpus, out, checkpoint), overrides)
        except UserError as problem:
            return str(problem)


def asked_to_stop(
    corpus: str, out: str, checkpoint: str, overrides: list[str], place: str = "", file: str = ""
) -> tuple[int, list[str]]:
    """The exit code of `finetune`, and the steps it made, as `lr-0.001:3`.

    At `place`, a step that begins or (as `lr-0.001:end`) the end of a learning rate, a minute and
    a second go by, or `file` appears in the run folder.
    """
    steps: list[str] = []
    real, gone = time.time, [0.0]

    def now() -> float:
        return real() + gone[0]

    def come_to(here: str) -> None:
        if here != place:
            return
        if file:
            (Path(out) / file).touch()
        else:
            gone[0] += 61

    class Stoppable(Trainer):
        def _step(self, step: int, batches: Any) -> Any:
            here = f"{self.run_dir.name}:{step}"
            come_to(here)
            steps.append(here)
            return super()._step(step, batches)

        def close(self) -> None:
            super().close()
            come_to(f"{self.run_dir.name}:end")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(spdf.dist, "destroy_process_group"))
        stack.enter_context(mock.patch.object(tuning, "Trainer", Stoppable))
        stack.enter_context(mock.patch.object(signals, "LOOK_SECONDS", 0.0))
        stack.enter_context(mock.patch.object(time, "time", now))
        try:
            finetune(_config(corpus, out, checkpoint), overrides)
        except Stopped as stopped:
            return stopped.code, steps
        finally:
            signals._process.ended, signals._process.exit_code = False, EXIT_STOPPED
    return 0, steps


def _config(corpus: str, out: str, checkpoint: str) -> Path:
    path = Path(f"{out}.yaml")
    tree = {
        "checkpoint": checkpoint,
        "output_dir": out,
        "precision": "fp32",
        "data": [{"path": corpus}],
        "seq_len": 32,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "max_steps": 3,
        "optimizer": {"lr": 2e-3},
        "schedule": {"type": "constant", "warmup_steps": 0},
        "logging": {"every": 1},
    }
    # Every rank writes it: none may read what another one has half written.
    temporary = Path(f"{path}.{os.getpid()}")
    temporary.write_text(json.dumps(tree))  # JSON is YAML
    temporary.replace(path)
    return path
