"""Importing this package registers the project's models with timm."""

from . import deit, dhvt, distilled, evit

__all__ = ['deit', 'dhvt', 'distilled', 'evit']
