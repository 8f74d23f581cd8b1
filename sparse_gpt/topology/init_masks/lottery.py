"""Lottery tickets (Frankle & Carbin 2019): the mask of a trained model's largest weights."""

from torch import Tensor


def final_magnitude(final: Tensor) -> Tensor:
    """|w| at the end of the run that the ticket is drawn from."""
    return final.abs()
