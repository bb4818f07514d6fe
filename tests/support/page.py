"""The lines of docs/with_your_library.md, and what they make of the parameters."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/with_your_library.md").read_text()


def lines_for(library, number=0):
    """A block of the page: the first after the library's mark, or a later one."""
    return re.findall(r"^```\n(.*?)^```", PAGE.partition(f"<!-- {library} -->")[2], re.DOTALL | re.MULTILINE)[
        number
    ]


def groups(optimizer):
    """By name, whether each parameter is adapted, and its weight decay."""
    return {
        name: (group.get("layer_adaptation", True), group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
