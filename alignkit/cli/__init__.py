"""Provide the ``alignkit`` command."""

from alignkit.cli.command import main

__all__ = ["main"]
