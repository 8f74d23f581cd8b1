"""Our own GPT as a `transformers` model, for what GPT-2 cannot express.

Importing this module registers it: `AutoModelForCausalLM.from_pretrained(folder)` then loads a
folder of `model_type: sparse_gpt`, with no code in the folder and no `trust_remote_code`.
config.json holds the fields of `GPTConfig`.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from sparse_gpt.hf.layout import MODEL_TYPE
from sparse_gpt.model.gpt import GPT, GPTConfig


class SparseGPTConfig(PreTrainedConfig):
    """The fields of `GPTConfig`, under their own names, beside those every config has."""

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    @property
    def gpt_config(self) -> GPTConfig:
        """The model; raises `ValueError` where config.json describes none."""
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        return GPTConfig.from_dict({n: getattr(self, n) for n in names if hasattr(self, n)})


class SparseGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """`GPT` with the interface of `transformers`; the head is the token embedding.

    Made from a config alone its parameters are uninitialised, as `GPT`'s are. It keeps no cache:
    generation computes the whole text again for every token.
    """

    config_class = SparseGPTConfig
    base_model_prefix = "gpt"
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: SparseGPTConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(config.gpt_config)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: weights come from the folder."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.gpt.wte

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """`input_ids [B, S]` -> logits `[B, S, vocab_size]`, and with `labels` a loss.

        `attention_mask [B, S]` is 0 at padding, on either side; padding is no position.
        `logits_to_keep`: of the last so many positions (0: all), or of those in a tensor. `labels`
        are of the kept positions, and shifted here, as `transformers` has it; -100 is not scored.
        """
        document_ids = positions = None
        if attention_mask is not None and not bool(attention_mask.all()):
            document_ids = attention_mask.long()
            positions = (document_ids.cumsum(1) - 1).clamp(min=0)
        logits = self.gpt.logits(input_ids, document_ids, positions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = logits[:, kept], None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


AutoConfig.register(MODEL_TYPE, SparseGPTConfig)
AutoModelForCausalLM.register(SparseGPTConfig, SparseGPTForCausalLM)
