"""Text from an exported folder, by the stock `transformers` generate."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparse_gpt.errors import UserError

DEFAULT_NEW_TOKENS = 100


@contextmanager
def exported(path: Path | str) -> Iterator[Path]:
    """A Hugging Face folder: `path` itself, or a temporary export of the checkpoint there."""
    path = Path(path)
    if (path / "config.json").is_file():
        yield path
        return
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give an exported folder, a run or a checkpoint")
    from sparse_gpt.hf.checkpoint import export_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        export_checkpoint(path, Path(temporary) / "export")
        yield Path(temporary) / "export"


def generate(
    folder: Path | str,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    stream: bool = False,
) -> str:
    """The prompt and its continuation; with `stream`, also printed as it comes.

    `temperature` 0 takes the likeliest token; `top_k` 0 and `top_p` 1 cut nothing off. An empty
    prompt starts a document. Without `max_new_tokens`, at most 100 and what the positions leave.
    Raises `UserError` for a folder without weights or tokenizer, and settings out of range.
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p)
    from transformers import TextStreamer
    from transformers.utils.logging import disable_progress_bar

    from sparse_gpt.hf.stock import stock_model, stock_tokenizer

    disable_progress_bar()  # it would stand in front of the text
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json; export from a run that has a tokenizer")
    model, tokenizer = stock_model(folder), stock_tokenizer(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [model.config.eos_token_id]
    if ids == [None]:
        raise UserError("--prompt: empty, and the model has no end-of-text token to start from")
    room = model.config.n_positions - len(ids)
    if room < (max_new_tokens or 1):
        raise UserError(
            f"--prompt has {len(ids)} tokens and the model {model.config.n_positions} positions; "
            f"that leaves room for --max-new-tokens {max(0, room)}"
        )
    target = _device(device)
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    output = model.to(target).generate(
        torch.tensor([ids], device=target),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=target),
        max_new_tokens=max_new_tokens or min(DEFAULT_NEW_TOKENS, room),
        do_sample=temperature > 0,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        **(sampling if temperature > 0 else {}),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _check_settings(
    max_new_tokens: int | None, temperature: float, top_k: int, top_p: float
) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {max_new_tokens} is not positive")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature: {temperature} is not 0 or more")
    if top_k < 0:
        raise UserError(f"--top-k: {top_k} is negative; 0 turns it off")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p: {top_p} is not in (0, 1]; 1 turns it off")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used: {reason}") from None
    return device
