"""Guided speech diffusion from a frozen classifier."""
