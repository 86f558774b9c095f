"""Importing this package registers the project's models with timm."""

from . import dhvt

__all__ = ['dhvt']
