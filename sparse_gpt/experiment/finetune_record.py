"""The record of one finished fine-tuning."""

from typing import Any

from sparse_gpt.experiment.corpora import Corpora
from sparse_gpt.experiment.finetune_stage import FinetuneRun
from sparse_gpt.experiment.record import about_run, describe_data, read_json
from sparse_gpt.train.results import FILE

# What a record has in other places.
ELSEWHERE = ("checkpoint", "seed", "steps", "tokens", "flops_spent", "precision", "device", "ranks")


def finetune_record(run: FinetuneRun, corpora: Corpora) -> dict[str, Any]:
    """What the folder of a finished fine-tuning says; the curve is of the learning rate chosen.

    `model` is the pretrained one's. Raises `UserError` where a part is missing.
    """
    results, plan = read_json(run.folder / FILE), run.after.plan
    return {
        **about_run(run, corpora, run.folder / results.get("run", "."), results),
        "after_data": describe_data(run.after.corpora, corpora),
        "storage": run.config.storage,
        "model": {
            **{key: getattr(plan.model, key) for key in ("n_layer", "n_head", "d_model", "d_ff")},
            "d_embed": plan.model.d_embed,
            "parameters": plan.parameters,
            "active_parameters": plan.active_parameters,
            "sparsity_nominal": plan.sparsity,
            "sparsity": plan.achieved_sparsity,
        },
        "flops": {"spent": results["flops_spent"]},
        "finetune": {key: value for key, value in results.items() if key not in ELSEWHERE},
    }
