"""RigL (Evci et al. 2020): drop by magnitude, grow by the largest dense gradient."""

from sparse_gpt.topology.methods.drop_grow import DropAndGrow

RIGL = DropAndGrow(name="rigl", growth="gradient")
