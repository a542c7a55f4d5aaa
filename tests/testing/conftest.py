"""The kit's own fixture, as a plugin's author would use it."""

from optkit.testing.fixtures import optkit_run

__all__ = ["optkit_run"]
