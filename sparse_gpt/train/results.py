"""What a finished run comes to: `results.json` beside its checkpoints."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparse_gpt.durable import sha256_file, write_json
from sparse_gpt.errors import UserError
from sparse_gpt.json_file import read_json
from sparse_gpt.train.evaluate import Evaluation
from sparse_gpt.train.first_rank import on_first_rank
from sparse_gpt.train.loop import Trainer
from sparse_gpt.train.manifest import NAME as MANIFEST

FILE = "results.json"
SPLITS = ("val", "test")


def describe(trainer: Trainer, split: str) -> dict[str, Any]:
    """Loss and perplexity a token and a (white-space) word of the source text, over a split.

    A collective; raises `Stopped` where the run was asked to stop meanwhile.
    """
    result: Evaluation = trainer.evaluate(split, stoppable=True)
    splits = [data.split(split) for data, _ in trainer.data]
    tokens, words = sum(s.n_tokens for s in splits), [s.n_words for s in splits]
    word_perplexity = None
    if all(words):
        ratio = tokens / sum(count or 0 for count in words)
        word_perplexity = math.exp(min(result.loss * ratio, 700.0))
    return {
        "loss": result.loss,
        "token_perplexity": result.perplexity,
        "word_perplexity": word_perplexity,
        "scored_tokens": result.tokens,
    }


def final_results(trainer: Trainer) -> dict[str, Any] | None:
    """Loss over the whole of val and test after the last step, written and shown. A collective.

    With `evaluation.patience` the best checkpoint is what counts. What an earlier start wrote of
    the same last checkpoint is taken as it is. None before the run's end (`stop_at`).
    """
    state = replace(trainer.state)  # loading the best checkpoint brings back its own
    path = trainer.run_dir / FILE
    if not (state.step >= trainer.total_steps or state.finished):
        return None
    last = trainer.checkpointer.newest()
    if last is None:
        raise UserError(f"{trainer.checkpointer.folder}: the last checkpoint is gone")
    digest = on_first_rank(lambda: sha256_file(last / MANIFEST), str(last))
    written = on_first_rank(lambda: read_results(path), str(path))
    if written is not None and written["checkpoint_sha256"] == digest:
        trainer.metrics.say(f"results in {path}")
        return written
    best = trainer.checkpointer.newest("best")
    if trainer.config.evaluation.patience is not None and best is not None:
        trainer.load(best)
    active, weights = trainer.controller.counts()
    results: dict[str, Any] = {
        "checkpoint_sha256": digest,
        "steps": state.step,
        "tested_step": trainer.state.step,
        "stopped_early": state.finished,
        "tokens": state.tokens,
        "flops_spent": state.flops_spent,
        "skipped_steps": state.skipped_steps,
        "sparse_layer_weights": weights,
        "active_weights": active,
        "precision": trainer.precision,
        "device": trainer.device.type,
        "ranks": trainer.world_size,
    }
    for split in SPLITS:
        if all(split in data.splits for data, _ in trainer.data):
            results[split] = describe(trainer, split)
            r = results[split]
            trainer.metrics.say(
                f"{split:<10} whole split: loss {r['loss']:.4f}  perplexity "
                f"{r['token_perplexity']:.2f} a token, {r['scored_tokens']:,} tokens"
            )
    on_first_rank(lambda: write_json(path, results), str(path))
    trainer.metrics.say(f"results in {path}")
    return results


def read_results(path: Path) -> dict[str, Any] | None:
    """What a finished run wrote; None where there is nothing. `UserError` for a broken file."""
    try:
        tree = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no JSON ({error}); remove it, and it is made anew") from None
    if not isinstance(tree, dict) or "checkpoint_sha256" not in tree:
        raise UserError(f"{path}: no results of a run; remove it, and they are made anew")
    return tree
