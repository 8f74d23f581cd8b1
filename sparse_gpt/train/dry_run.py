"""One step that changes nothing, before the first that does."""

from typing import Any

import torch

from sparse_gpt.config import RunConfig


def dry_run(engine: Any, optimizer: Any, config: RunConfig, accumulation: int) -> None:
    """Forward, backward and a held optimizer step: out-of-memory and broken shapes show now.

    A collective. The generators are left as they were.
    """
    device = engine.device
    states = (torch.get_rng_state(), _cuda_rng_state(device))
    engine.train()
    shape = (config.micro_batch_size, config.seq_len)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    documents = ids if config.document_attention else None
    for _ in range(accumulation):
        engine.backward(engine(ids, ids, document_ids=documents))
        optimizer.hold = True
        engine.step()
    optimizer.hold = False
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def _cuda_rng_state(device: torch.device) -> torch.Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None
