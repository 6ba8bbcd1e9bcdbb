"""Training networks that are easy to certify."""

from crcbook.training.loop import best_epoch, knows_bfloat16, train
from crcbook.training.recipe import CHOICES, METHODS, Recipe

__all__ = ["CHOICES", "METHODS", "Recipe", "best_epoch", "knows_bfloat16", "train"]
