"""Importing this package registers the project's models with timm."""

from . import deit, dhvt, evit

__all__ = ['deit', 'dhvt', 'evit']
