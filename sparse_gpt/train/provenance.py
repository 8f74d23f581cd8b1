"""What a run folder records about where its numbers come from."""

import functools
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

CODE = ("sparse_gpt", "launch", "eval", "pyproject.toml")


def write_provenance(run_dir: Path, resolved_config: str) -> None:
    """`config.yaml`, `environment.json`, `requirements.txt`, and the git revision and diff."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(resolved_config, encoding="utf-8")
    (run_dir / "requirements.txt").write_text(_packages(), encoding="utf-8")
    source = Path(__file__).resolve().parents[2]
    environment = {
        "python": sys.version,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
        "git_revision": _git(source, "rev-parse", "HEAD"),
        "uncommitted": _uncommitted(source),
        "argv": sys.argv,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")
    (run_dir / "git.diff").write_text(_git(source, "diff", "HEAD") or "", encoding="utf-8")


def _uncommitted(source: Path) -> list[str] | None:
    """Files of the code that are not as in the revision; results and notes beside it may change."""
    status = _git(source, "status", "--porcelain", "--", *CODE)
    return None if status is None else [line[2:].strip() for line in status.splitlines()]


@functools.cache
def _packages() -> str:
    """What is installed; a second's work."""
    packages = {f"{dist.metadata['Name']}=={dist.version}" for dist in metadata.distributions()}
    return "\n".join(sorted(packages)) + "\n"


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git; None where this is no checkout or git is not installed."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
