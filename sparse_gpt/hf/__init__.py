"""To and from a Hugging Face GPT-2 folder."""

from sparse_gpt.hf.export import export_folder
from sparse_gpt.hf.load import ImportedWeights, import_folder

__all__ = ["ImportedWeights", "export_folder", "import_folder"]
