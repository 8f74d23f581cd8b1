"""To and from a Hugging Face folder: GPT-2's, or of `hf.model` where GPT-2 cannot express it."""

from sparse_gpt.hf.export import export_folder
from sparse_gpt.hf.load import ImportedWeights, import_folder

__all__ = ["ImportedWeights", "export_folder", "import_folder"]
