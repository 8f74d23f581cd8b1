"""First topologies that are not random: scores of weights at initialisation, and the choice.

Each method is a pure function from weights and gradients to scores; larger is kept. They share
`choose`: the model's best units, in an exact number.
"""

from sparse_gpt.topology.init_masks.choose import Choice, choose

__all__ = ["Choice", "choose"]
