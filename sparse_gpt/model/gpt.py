"""GPT-3: a pre-LN, GPT-2-style decoder with learned positions and tied embeddings.

Attention is full and causal in every layer (the authors' GPT code; FACTS section 2). q, k and v
are separate layers, so that each has its own topology; they are fused only at export.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_gpt.ift.forms import Transform, drawn_as, layer_of, weight_std
from sparse_gpt.ift.layers import transformed_linear
from sparse_gpt.model.flops import layer_shapes
from sparse_gpt.model.linear import SparseLinear, linears
from sparse_gpt.model.loss import IGNORE, head_loss
from sparse_gpt.ops import ACTIVATIONS, BlockLayout

MAX_LAYERS = 1_000
MAX_SIZE = 2**30  # of a side: the number of elements of a matrix fits into 64 bits
_SIZES = ("n_layer", "n_head", "d_model", "d_ff", "vocab_size", "n_positions")


@dataclass(frozen=True)
class GPTConfig:
    """All that a GPT is built from. `d_head = d_model / n_head`; `n_positions`: longest sequence.

    `transform`: the layers that a Sparse-IFT member gave another form; None where all are plain.
    `d_embed`: width of the tied token embedding where it is not d_model. Then a dense projection
    d_embed -> d_model follows the look-up, and one back comes before the head.
    `loss_chunk`: tokens whose logits a loss makes at a time; None for all at once.
    """

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    vocab_size: int
    n_positions: int
    activation: str = "gelu"  # "gelu" (exact) or "gelu_new" (tanh, Hugging Face GPT-2)
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    activation_checkpointing: bool = False
    loss_chunk: int | None = None
    transform: Transform | None = None
    d_embed: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            size, most = getattr(self, name), MAX_LAYERS if name == "n_layer" else MAX_SIZE
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} {size!r:.40} is not a number from 1 to {most}")
        for name in ("dropout", "layer_norm_epsilon", "init_std"):
            value = getattr(self, name)
            most = 1 if name == "dropout" else math.inf
            if not isinstance(value, int | float) or not 0 <= value < most:
                raise ValueError(f"{name} {value!r:.40} is not a number from 0 to below {most}")
        if self.activation not in tuple(ACTIVATIONS):
            raise ValueError(f"activation {self.activation!r:.40} is none of {tuple(ACTIVATIONS)}")
        if not isinstance(self.activation_checkpointing, bool):
            raise ValueError("activation_checkpointing is neither true nor false")
        if self.loss_chunk is not None and (
            type(self.loss_chunk) is not int or self.loss_chunk < 1
        ):
            raise ValueError(f"loss_chunk {self.loss_chunk!r:.40} is not a positive number")
        if self.d_model % self.n_head:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_head {self.n_head}")
        if self.d_embed is not None and (
            type(self.d_embed) is not int or not 1 <= self.d_embed <= MAX_SIZE
        ):
            raise ValueError(f"d_embed {self.d_embed!r:.40} is not a positive number")
        if self.transform is not None:
            unknown = self.transform.sizes.keys() - self.layer_shapes.keys()
            if unknown:
                raise ValueError(f"{sorted(unknown)[0]} is not a layer of the model")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_head

    @cached_property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of every linear layer of the blocks, by name: `h.0.attn.q`, ..."""
        return layer_shapes({"n_layer": self.n_layer, "d_model": self.d_model, "d_ff": self.d_ff})

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "GPTConfig":
        """From what `dataclasses.asdict` made of one; `ValueError` for keys that do not fit."""
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= tree.keys() <= {field.name for field in fields(cls)}:
            raise ValueError(f"a GPT has not the keys {sorted(tree)}")
        given = dict(tree)
        if given.get("transform") is not None:
            given["transform"] = Transform(**given["transform"])
        return cls(**given)


def check_modules(config: GPTConfig, tensors: int) -> None:
    """`ValueError` for a model of more layers and branches than there are tensors for.

    Each has some of its own, so what is built to compare with the tensors is no larger than they.
    """
    transform = config.transform
    branches = sum(transform.sizes.values()) if transform and transform.member == "parallel" else 0
    for what, number in (("layers", config.n_layer), ("branches", branches)):
        if number > tensors:
            raise ValueError(f"{number} {what}, but there are {tensors} tensors in all")


# Where the active blocks of compactly stored weights are, by weight name: `h.0.attn.q.weight`.
Layouts = Mapping[str, BlockLayout]


def linear(config: GPTConfig, name: str, layouts: Layouts) -> nn.Module:
    """A linear layer of the blocks by name (`h.0.attn.q`), plain or in its member's form."""
    out, inner = config.layer_shapes[name]
    transform = config.transform
    if transform is None or name not in transform.sizes:
        return SparseLinear(inner, out, layout=layouts.get(f"{name}.weight"))
    mine = {
        weight.removeprefix(f"{name}."): layout
        for weight, layout in layouts.items()
        if weight.startswith(f"{name}.")
    }
    return transformed_linear(
        transform.member, transform.sizes[name], (out, inner), transform.non_linearity, mine
    )


class Attention(nn.Module):
    """Multi-head causal self-attention; with document ids it also stops at their boundaries."""

    def __init__(self, config: GPTConfig, name: str, layouts: Layouts) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.q, self.k, self.v, self.o = (
            linear(config, f"{name}.{part}", layouts) for part in "qkvo"
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, length, self.n_head, -1).transpose(1, 2)

        q, k, v = linears(x, (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            heads(q),
            heads(k),
            heads(v),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: GPTConfig, name: str, layouts: Layouts) -> None:
        super().__init__()
        self.fc1 = linear(config, f"{name}.fc1", layouts)
        self.fc2 = linear(config, f"{name}.fc2", layouts)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        (hidden,) = linears(x, (self.fc1,), self.activation)
        return self.fc2(hidden)


class Block(nn.Module):
    """One pre-LN transformer block, of the name `h.<i>`."""

    def __init__(self, config: GPTConfig, name: str, layouts: Layouts) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, f"{name}.attn", layouts)
        self.ln_2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, f"{name}.mlp", layouts)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), mask))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Token ids to next-token logits, or to a loss where targets are given.

    Weights are uninitialised until `init_weights`: initialisation is a function of (seed, name),
    not of the order of construction, and at ZeRO 3 it happens one parameter at a time.

    `layouts`: weights in compact storage, by name; the others are dense parameters.
    """

    def __init__(self, config: GPTConfig, layouts: Layouts | None = None) -> None:
        super().__init__()
        layouts = layouts or {}
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_embed or config.d_model)
        self.project_in: nn.Linear | None = None
        self.project_out: nn.Linear | None = None
        if config.d_embed is not None:
            self.project_in = nn.Linear(config.d_embed, config.d_model, bias=False)
            self.project_out = nn.Linear(config.d_model, config.d_embed, bias=False)
        self.wpe = nn.Embedding(config.n_positions, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, f"h.{i}", layouts) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def hidden(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`input_ids [B, S]` -> final hidden states `[B, S, d_model]`, after the last LayerNorm.

        `positions [B, S]`: of each token; 0, 1, ... without it. `mask [B, 1, S, S]`: added to the
        attention scores, in place of the causal mask and of `document_ids`.
        """
        length = input_ids.shape[1]
        if length > self.config.n_positions:
            raise ValueError(
                f"a sequence of {length} tokens is longer than n_positions "
                f"{self.config.n_positions}"
            )
        if mask is None and document_ids is not None:
            mask = document_mask(document_ids)
        if positions is None:
            positions = torch.arange(length, device=input_ids.device)
        x = self.wte(input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = self.drop(x + self.wpe(positions))
        for block in self.h:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.ln_f(x)

    def logits(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """`[B, S]` -> `[B, S, vocab_size]` in the model's dtype; the head is the embedding."""
        return F.linear(self.head_input(input_ids, document_ids, positions), self.wte.weight)

    def head_input(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the head sees: hidden states at the width of the embedding.

        The projection to it stands behind the last LayerNorm: the residual stream grows with
        depth, and the norm belongs to the width it was summed in.
        """
        x = self.hidden(input_ids, document_ids, positions, mask)
        return x if self.project_out is None else self.project_out(x)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or with `targets [B, S]` (`-100` = not scored) the cross-entropy in nats."""
        chunk = self.config.loss_chunk
        if targets is not None and chunk is not None and reduction != "none":
            x = self.head_input(input_ids, document_ids).flatten(0, 1)
            return head_loss(x, self.wte.weight, targets.flatten(), chunk, reduction)
        logits = self.logits(input_ids, document_ids)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction=reduction,
        )

    def sparse_layers(self) -> dict[str, SparseLinear]:
        """Every layer that can be sparse, by the name of its weight: `h.0.attn.q.weight`, ...

        The names and shapes are those of `model.flops.linear_shapes`.
        """
        return {
            f"{name}.weight": module
            for name, module in self.named_modules()
            if isinstance(module, SparseLinear)
        }

    def init_weights(
        self,
        seed: int,
        gathered: Callable[[nn.Parameter], AbstractContextManager[object]] | None = None,
    ) -> None:
        """Initialise every parameter from (seed, its name).

        | parameter                         | value                                            |
        |-----------------------------------|--------------------------------------------------|
        | wte, wpe, q, k, v, fc1            | normal, std 0.02, truncated at 2 std             |
        | attention output, fc2 (residual)  | the same with std 0.02 / sqrt(2 n_layer)         |
        | project_in, project_out           | the same with std 1 / sqrt(fan-in)               |
        | biases                            | 0                                                |
        | LayerNorm                         | weight 1, bias 0                                 |

        The same at every width and sparsity (the authors' GPT code; FACTS section 2). Weights of
        transformed layers: `ift.forms.weight_std` of these. The projections keep the variance of
        what goes through them, so that embeddings and logits start on the scale of the model
        without them. A weight in compact storage gets the active blocks of what it would get
        otherwise. `gathered` opens one parameter at a time where parameters are sharded.
        """
        layers = self.sparse_layers()
        for name, parameter in self.named_parameters():
            with gathered(parameter) if gathered else nullcontext(), torch.no_grad():
                if name.endswith("bias"):
                    parameter.zero_()
                elif ".ln_" in name or name.startswith("ln_"):
                    parameter.fill_(1.0)
                elif name.startswith("project_"):
                    std = parameter.shape[1] ** -0.5
                    parameter.copy_(draw_weight(seed, name, tuple(parameter.shape), std))
                else:
                    layer = layers.get(name)
                    layout = None if layer is None else layer.layout
                    shape = tuple(parameter.shape) if layout is None else layout.shape
                    std = initial_std(self.config, name)
                    weight = draw_weight(seed, drawn_as(name), shape, std)
                    parameter.copy_(weight if layout is None else layout.gather(weight))


def initial_std(config: GPTConfig, name: str) -> float:
    """Standard deviation of a weight matrix or an embedding; see `GPT.init_weights`."""
    layer, std = layer_of(name), config.init_std
    if layer.endswith(("attn.o", "mlp.fc2")):
        std /= math.sqrt(2 * config.n_layer)
    transform = config.transform
    if transform is None or layer not in transform.sizes:
        return std
    weight = name.removeprefix(f"{layer}.")
    shape = config.layer_shapes[layer]
    return weight_std(transform.member, transform.sizes[layer], shape, weight, std)


def draw_weight(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """fp32 normal values truncated at 2 std, a function of (seed, name) alone; on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.empty(shape, dtype=torch.float32)
    return nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator)


def document_mask(document_ids: Tensor) -> Tensor:
    """`[B, S]` document numbers -> bool `[B, 1, S, S]`, True where a position may look."""
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return (same & causal)[:, None]
