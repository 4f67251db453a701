"""Where the grammar and the policy library lie: in the package, or in the checkout around it."""

from pathlib import Path


def resource(*parts: str) -> Path:
    """The path of a shipped file, e.g. `resource("grammar", "itm.lark")`."""
    package = Path(__file__).parent
    installed = package / "shipped" / Path(*parts)
    return installed if installed.exists() else package.parent / Path(*parts)
