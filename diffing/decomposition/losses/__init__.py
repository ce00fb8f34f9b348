"""The terms that a decomposition is trained with, one file each; definitions in docs/math.md."""
