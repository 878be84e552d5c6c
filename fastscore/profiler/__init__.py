"""Profiles of a sampling run: where its time goes, against what the machine could do."""
