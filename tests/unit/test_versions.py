"""constraints-lowest.txt has the lower bounds of pyproject.toml."""

import re
import tomllib

from packaging.version import Version
from support.paths import ROOT


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    waiting, seen, bounds = [*table["dependencies"], "omnimem[all,test]"], set(), {}
    for requirement in waiting:
        if own := re.fullmatch(r"omnimem\[(.+)\]", requirement):
            waiting += [each for extra in own[1].split(",") if extra not in seen for each in extras[extra]]
            seen |= set(own[1].split(","))
            continue
        found = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        assert found is not None, f"{requirement} has no lower bound"
        name, bound = found.groups()
        bounds[name] = max(bound, bounds.get(name, bound), key=Version)
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == [f"{n}=={bounds[n]}" for n in sorted(bounds)]
