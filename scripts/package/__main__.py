"""``python -m mythos_edge`` is the command ``mythos-edge``."""

from mythos_edge.scripts.cli import entry

if __name__ == "__main__":
    entry()
