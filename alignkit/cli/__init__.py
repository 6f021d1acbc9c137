"""Provide the ``alignkit`` command."""

from alignkit.cli.front import main

__all__ = ["main"]
