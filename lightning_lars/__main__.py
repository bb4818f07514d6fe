"""``python -m lightning_lars``: :class:`~lightning_lars.cli.LargeBatchCLI` for any module, and reports."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        from lightning_lars.run_report.command import main

        main(sys.argv[2:])
    else:
        from lightning_lars.cli import LargeBatchCLI

        LargeBatchCLI()
