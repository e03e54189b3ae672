"""HTML pages that need nothing beside them."""

from collections.abc import Mapping
from typing import Any

import jinja2


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """One of `tools/templates`, filled in; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tools"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(content)
