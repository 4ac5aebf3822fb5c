"""Transforms that change the weights and not the function: what is hard to round is moved to where it is not."""
