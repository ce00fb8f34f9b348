"""Names of a package that are loaded when first used, so that importing the package costs nothing."""

from collections.abc import Callable, Mapping


def loader(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Return a package's `__getattr__`. homes: the module that each public name lives in."""

    def load(name: str) -> object:
        import importlib

        if name in homes:
            return getattr(importlib.import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
