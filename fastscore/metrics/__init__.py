"""Judging generated speech: a recogniser of its own, distances, spread and quality."""
