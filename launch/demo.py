"""The main job from end to end on an embedded corpus: python launch/demo.py [--device cpu]

Prepares Python's own standard library as a corpus, trains Sparse Wide 75 % with SET at ZeRO 2,
stops, resumes, exports, evaluates held-out perplexity and a small lm-eval task, fine-tunes
densely, and prints what it made. Every step is a command that is shown before it runs.
"""

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import UserError, run_main

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Demo:
    """Runs the commands of the demo, in order, and remembers how long each took."""

    folder: Path
    device: str
    ranks: int
    seconds: dict[str, float] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        env = dict(os.environ, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        if self.device == "cpu":
            env.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        return env

    def run(self, title: str, command: list[str]) -> None:
        """Run one step; a failing one ends the demo with its exit code."""
        print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=self.environment()).returncode
        self.seconds[title] = time.perf_counter() - start
        if code:
            raise UserError(f"the step {title!r} ended with exit code {code}")

    def python(self, title: str, *arguments: str) -> None:
        self.run(title, [sys.executable, *arguments])

    def deepspeed(self, title: str, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        ranks = ["--num_accelerators", str(self.ranks), "--master_port", str(port)]
        self.run(title, [launcher, *ranks, *arguments])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="%(default)s")
    args = parser.parse_args()
    demo = Demo(args.folder, *choose_device(args.device))
    folder = demo.folder
    claim(ROOT / folder)
    data, pretrained, exported = f"{folder}/data", f"{folder}/pretrain", f"{folder}/model"
    finetuned, text = f"{folder}/finetune", f"{folder}/held_out.txt"

    demo.python(
        "prepare the corpus",
        *("launch/prepare_data.py", "--out", data, "--tokenizer", "bpe"),
        *("--vocab-size", "2048", "--val-fraction", "0.05"),
    )
    train = ("launch/pretrain.py", "configs/demo.yaml", f"output_dir={pretrained}")
    source = f"data=[{{path: {data}}}]"
    demo.deepspeed("pretrain, stop half-way", *train, source, "stop_at=100")
    demo.deepspeed("resume and finish", *train, source, "checkpoint.resume=required")
    demo.python("export", "launch/export_hf.py", pretrained, "--out", exported)
    write_held_out(ROOT / data, ROOT / text)
    demo.python(
        "held-out perplexity",
        *("eval/perplexity.py", exported, "--text", text, "--limit-tokens", "20000"),
        *("--out", f"{folder}/eval"),
    )
    demo.python(
        "lm-eval task",
        *("eval/local_task.py", exported, "--text", text, "--items", "60"),
        *("--out", f"{folder}/eval"),
    )
    demo.deepspeed(
        "fine-tune densely",
        *("launch/finetune.py", "configs/finetune/demo.yaml", f"output_dir={finetuned}"),
        *(source, f"checkpoint={pretrained}"),
    )
    summarise(demo)
    return 0


def claim(folder: Path) -> None:
    """Start with an empty folder; deletes only what an earlier demo made."""
    marker = folder / ".made_by_demo"
    if folder.exists() and any(folder.iterdir()):
        if not marker.exists():
            raise UserError(f"--folder {folder} holds something else; choose an empty one")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()


def choose_device(wanted: str) -> tuple[str, int]:
    """(device, ranks): the GPUs there are, else two CPU ranks."""
    import torch

    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU; use --device cpu")
    if not gpus:
        return "cpu", 2
    # The demo's batch of 16 sequences in micro-batches of 8 fits at most two ranks.
    return "cuda", min(gpus, 2)


def write_held_out(data: Path, out: Path) -> None:
    """The text of the held-out documents, decoded from the validation shards."""
    from sparse_gpt.data.shards import open_data
    from sparse_gpt.data.tokenizer import load_tokenizer

    opened = open_data(data)
    split, tokenizer = opened.split("val"), load_tokenizer(data / "tokenizer")
    ids = split.read(0, split.n_tokens)
    text = tokenizer.decode(ids[ids != opened.eos_id].tolist())
    out.write_text(text, encoding="utf-8")


def summarise(demo: Demo) -> None:
    """A closing table: what was made, where, and the numbers that matter."""
    from rich.console import Console
    from rich.table import Table

    folder = ROOT / demo.folder
    lines = (folder / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record["loss"] for record in records if record["kind"] == "validation"]
    last = [record for record in records if record["kind"] == "train"][-1]
    tuned = json.loads((folder / "finetune" / "results.json").read_text())
    table = Table(title="Demo: Sparse Wide 75 %, SET, ZeRO 2", title_justify="left")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("result")
    results = {
        "prepare the corpus": f"{demo.folder}/data",
        "pretrain, stop half-way": f"validation loss {losses[0]:.3f} at the first validation",
        "resume and finish": f"validation loss {losses[-1]:.3f}, sparsity {last['sparsity']:.4f}, "
        f"{last['flops_spent']:.2e} FLOPs, {demo.folder}/pretrain",
        "export": f"{demo.folder}/model (loads in transformers)",
        "held-out perplexity": f"{demo.folder}/eval",
        "lm-eval task": f"{demo.folder}/eval",
        "fine-tune densely": f"validation loss {tuned['validation_loss']:.3f}, "
        f"{demo.folder}/finetune",
    }
    for title, seconds in demo.seconds.items():
        table.add_row(title, f"{seconds:.0f}", results[title])
    table.add_row("all", f"{sum(demo.seconds.values()):.0f}", f"on {demo.device}")
    Console(width=110).print(table)
    if not losses[-1] < losses[0]:
        raise UserError("the validation loss did not fall: something is wrong")


if __name__ == "__main__":
    run_main(main)
