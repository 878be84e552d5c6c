"""Subcommands of the program: ``add_parser`` describes one, ``run`` imports what it needs."""
