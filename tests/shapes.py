"""The names under which tests use vdx.models.shapes."""

from vdx.models.shapes import init_shapes, new_shapes

__all__ = ["init_shapes", "new_shapes"]
