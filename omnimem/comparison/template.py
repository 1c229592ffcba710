"""Page templates with the common style sheet and number formats, for the report and the inspector."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from omnimem.comparison.formatting import count, percent, points, seconds, shown, size
from omnimem.errors import counted

FILTERS = (percent, points, shown, size, count, counted, seconds)


def page_template(page: Path) -> Template:
    """The template in a file."""
    environment = Environment(
        loader=FileSystemLoader([page.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {each.__name__: each for each in FILTERS}
    return environment.get_template(page.name)
