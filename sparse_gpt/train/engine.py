"""From a configuration to a running DeepSpeed engine: the one place that imports deepspeed."""

import logging
import os
import socket
import warnings
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from sparse_gpt.allocator import keep_freed_memory
from sparse_gpt.config import RunConfig, TimeoutsConfig
from sparse_gpt.errors import UserError
from sparse_gpt.model.gpt import GPT, GPTConfig
from sparse_gpt.ops import BlockLayout
from sparse_gpt.train import unfreezing
from sparse_gpt.train.optim import AdamW, build_optimizer, prime_optimizer

logger = logging.getLogger(__name__)


def init_ranks(timeout: float | None = None) -> torch.device:
    """Join the other ranks; returns this rank's device. One process without a launcher is one rank.

    `timeout`: seconds for the others to come, and for each exchange (default: that of
    `TimeoutsConfig`). gloo on CPUs, NCCL on GPUs. On CPUs DeepSpeed's shared-memory operation is
    left out: it needs a compiler and gains nothing here; and freed memory is kept.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    # DeepSpeed's own chatter: its progress notes, and its use of names torch is renaming.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator: Any = deepspeed.get_accelerator()
    on_gpu = accelerator.device_name() == "cuda"
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            verbose=False,
            timeout=timedelta(seconds=timeout or TimeoutsConfig().exchange),
        )
    if not on_gpu:
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def log_on_first_rank() -> None:
    """Show what the library logs once (such as the kernel `auto` took), on rank 0 alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    level = logging.INFO if dist.get_rank() == 0 else logging.ERROR
    logging.getLogger("sparse_gpt").setLevel(level)


def resolve_precision(config: RunConfig, device: torch.device) -> str:
    """`auto` is bf16 where the hardware computes in it and ZeRO keeps fp32 masters, else fp32."""
    if config.precision != "auto":
        return config.precision
    if config.deepspeed.zero_stage == 0:
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return "bf16" if native else "fp32"


def deepspeed_config(
    config: RunConfig, precision: str, world_size: int, device: torch.device
) -> dict[str, Any]:
    """The DeepSpeed configuration. Clipping and schedules are ours, so neither appears in it."""
    d = config.deepspeed
    zero: dict[str, Any] = {
        "stage": d.zero_stage,
        "reduce_bucket_size": d.reduce_bucket_size,
        "allgather_bucket_size": d.allgather_bucket_size,
        # On CPUs there is no second stream to overlap with.
        "overlap_comm": d.overlap_comm and device.type == "cuda",
    }
    if d.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if d.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = d.param_persistence_threshold
        if config.sparsity.update.scope == "model":
            # One optimizer step for all layers, so that their weights can be compared.
            zero["sub_group_size"] = 10**15
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "steps_per_print": 10**12,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32" if precision == "fp32" else d.communication_data_type,
    }


def build_model(
    config: RunConfig,
    gpt_config: GPTConfig,
    ds_config: dict[str, Any],
    initialise: Callable[[GPT, Callable[[Any], AbstractContextManager[object]] | None], None],
    layouts: Mapping[str, BlockLayout] | None = None,
) -> GPT:
    """Construct and initialise the model; at stage 3 no rank ever holds all of it.

    `layouts`: weights in compact storage.

    `initialise(model, gathered)` fills the parameters; `gathered` opens one parameter at a time
    where they are sharded, and is None where they are whole.
    """
    if config.deepspeed.zero_stage < 3:
        model = GPT(gpt_config, layouts)
        initialise(model, None)
        return model
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = GPT(gpt_config, layouts)

    def gathered(parameter: Any) -> AbstractContextManager[object]:
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    initialise(model, gathered)
    return model


def start_engine(
    model: GPT, config: RunConfig, ds_config: dict[str, Any], sparse: Container[str] = ()
) -> tuple[Any, AdamW]:
    """`deepspeed.initialize`; the optimizer comes back at step 0 with zero moments.

    `sparse`: the weights of sparse layers.
    """
    import deepspeed

    phase_of = None
    if config.unfreezing is not None:
        tied, n_layer = config.unfreezing.tied_embedding, len(model.h)
        phase_of = partial(unfreezing.phase_of, n_layer=n_layer, tied_embedding=tied)
    optimizer = build_optimizer(model, config.optimizer, sparse, phase_of)
    if config.model.compile:
        if config.deepspeed.zero_stage == 3:
            raise UserError("model.compile: not with deepspeed.zero_stage 3; set one of them off")
        for block in model.h:
            block.compile()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if config.deepspeed.zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would copy all gradients, and back
    prime_optimizer(optimizer, _masters(engine, optimizer))
    return engine, optimizer


def free_engine(engine: Any) -> None:
    """Free an engine, so that the next one of the process starts clean.

    Keep no reference to the engine, its optimizer or its module afterwards.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    engine.destroy()
    # What ZeRO-3 leaves behind: it appends the model to a module-level list at every forward
    # pass, and a cache on a method keeps its coordinator, hence the engine.
    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    for method in vars(coordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # within another decorator
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
    # And it puts its own function in the place of torch's, for good.
    native: Any = torch._C
    torch.nn.functional.linear = native._nn.linear


def _masters(engine: Any, optimizer: AdamW) -> list[torch.Tensor]:
    """The tensors the inner optimizer really steps."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
