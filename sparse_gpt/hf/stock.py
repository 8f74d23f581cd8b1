"""A Hugging Face folder read by stock `transformers`, without code, pickles or network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_gpt.data.tokenizer import LARGEST_FILE
from sparse_gpt.errors import UserError
from sparse_gpt.hf.layout import MODEL_TYPE
from sparse_gpt.hf.load import ImportedWeights
from sparse_gpt.json_file import read_bytes, read_object
from sparse_gpt.model_files import check_weights, refuse_code

# Of a folder, and nothing else: a file that is missing would be looked for on the hub.
_OURS: Any = {"local_files_only": True, "trust_remote_code": False}
_BAD = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
_BAD += (RuntimeError, SafetensorError)


def stock_model(folder: Path, **options: Any) -> Any:
    """`AutoModelForCausalLM` of a folder. Raises `UserError` for one that is refused or broken."""
    check_folder(folder)
    from transformers import AutoModelForCausalLM

    import sparse_gpt.hf.model  # noqa: F401  (registers our own model type)

    with naming(folder):
        return AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, **_OURS, **options
        )


@contextmanager
def naming(folder: Path) -> Iterator[None]:
    """What libraries raise of a broken model becomes a `UserError` that names its folder."""
    try:
        yield
    except UserError:
        raise
    except _BAD as error:
        raise UserError(f"{folder}: {_line(error)}") from error


def check_folder(folder: Path) -> None:
    """Everything that is refused before `transformers` sees the folder."""
    refuse_code(folder)
    try:
        config = read_object(folder / "config.json", unique=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    check_weights(folder, config)
    if config.get("model_type") == MODEL_TYPE:
        ImportedWeights(folder)  # every name and shape


def stock_tokenizer(folder: Path) -> Any:
    """`AutoTokenizer` of a folder. Raises `UserError` for one that is refused or broken."""
    refuse_code(folder)
    from transformers import AutoTokenizer

    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            read_bytes(path, LARGEST_FILE)
        return AutoTokenizer.from_pretrained(folder, **_OURS)
    except Exception as error:  # the Rust library raises bare Exception for a bad file
        raise UserError(f"{path if path.is_file() else folder}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
