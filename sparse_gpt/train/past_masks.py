"""Which weights were ever active, in checkpoints: written beside the masks, and read back."""

from dataclasses import replace

from sparse_gpt.errors import UserError
from sparse_gpt.topology.bits import Bits
from sparse_gpt.topology.controller import TopologyController
from sparse_gpt.topology.masks import LayerMask
from sparse_gpt.train.checkpoint_files import CheckpointReader
from sparse_gpt.train.every_rank import on_every_rank


def past_masks(controller: TopologyController, counts: dict[str, int]) -> dict[str, LayerMask]:
    """What to write: layers where more units were active at some time than are now.

    `counts`: units ever active, by layer; where they are the active ones there is nothing to add.
    """
    masks = controller.masks
    return {
        name: replace(masks[name], bits=bits)
        for name, bits in (controller.ever.bits or {}).items()
        if counts[name] != masks[name].active
    }


def load_past(controller: TopologyController, reader: CheckpointReader) -> None:
    """What was active before, into a controller that has the checkpoint's masks. A collective.

    It stays unknown after a checkpoint that does not say. Raises `UserError` on every rank where
    the files are broken.
    """
    masks, ever, shards = controller.masks, controller.ever, controller.shards
    counts = {name: reader.layers[name].ever_active for name in masks}
    if any(count is None for count in counts.values()):
        ever.bits = None
        return
    read: dict[str, Bits] = {}

    def load() -> None:
        for name, mask in masks.items():
            flags = reader.ever_active(name, mask.start, mask.bits.numel)
            read[name] = Bits.of(flags).to(shards.state_device)

    on_every_rank(load, f"checkpoint {reader.path}")
    ever.bits = read
    ever.add(list(masks), masks)  # adds nothing, unless the file is wrong
    found = ever.counts(masks, shards)
    wrong = [name for name, count in found.items() if count != counts[name]]
    if wrong:
        raise UserError(
            f"broken checkpoint {reader.path}: its files say of {wrong[0]} that "
            f"{found[wrong[0]]} units were ever active, its manifest {counts[wrong[0]]}"
        )
