"""Bringing models in: checkpoints of other packages become softpick checkpoints, or are refused by name."""
