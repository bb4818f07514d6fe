"""``python -m lightning_lars``: :class:`~lightning_lars.cli.LargeBatchCLI` for any module and data."""

from lightning_lars.cli import LargeBatchCLI

if __name__ == "__main__":
    LargeBatchCLI()
