"""The library behind the scripts of briskGPT. Each module has one subject and is usable alone."""

from pathlib import Path


def repository():
    """The root of the git clone with this package, or None if it is installed without one.

    All paths to the repository are derived here, so that modules can move.
    """
    root = Path(__file__).parent.parent
    return root if any(root.glob("data/*/prepare.py")) else None
