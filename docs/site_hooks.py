"""Hooks of the documentation site: links that leave docs/ lead to the repository."""

import re
from typing import Any

#: A Markdown link to a place outside docs/.
_OUTSIDE = re.compile(r"\]\((?:\.\./)+([^)]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replace links to files outside docs/ by links to the same files in the repository."""
    return _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1)", markdown)
