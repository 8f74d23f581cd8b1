"""SET (Mocanu et al. 2018): drop by magnitude, grow at random."""

from sparse_gpt.topology.methods.drop_grow import DropAndGrow

SET = DropAndGrow(name="set", growth="random")
