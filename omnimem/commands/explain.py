"""Print fields, types, defaults and meaning of any key of a config.

omnimem explain                           # the sections
omnimem explain memory.policy.snapkv      # any section or key
omnimem explain train.learning_rate
omnimem explain --markdown                # docs/configuration.md
"""

from collections.abc import Sequence

from omnimem.cli.parser import Parser
from omnimem.config.reference import explain, markdown
from omnimem.training.arguments import REFUSED, on_resume, train_docs, train_section


def main(arguments: Sequence[str]) -> None:
    """Print what a key means; raises UserError, with the nearest key of the same section, if there is no such key."""
    parser = Parser(__doc__)
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="such as tuning.lora; none: the sections")
    parser.add_argument("--markdown", action="store_true", help="all keys as a page")
    given = parser.parse(arguments)
    if given.markdown:
        print(markdown(train_section(), train_docs(), on_resume(), REFUSED), end="")
    else:
        print(explain(given.key, train_section(), train_docs()))
