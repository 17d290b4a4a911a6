"""The tiny model of the commands' tests."""

from tests.commands.conftest import tiny_base

__all__ = ["tiny_base"]
