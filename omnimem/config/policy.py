"""Any policy by its name, without a config file."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, final

from pydantic import Field

from omnimem.budget import Budget
from omnimem.config.check import strict, validated
from omnimem.config.source import ConfigError, dotted
from omnimem.policies import PolicyOptions
from omnimem.policies.base import Policy, SelectionFrom


@strict
@final
@dataclass(frozen=True, kw_only=True)
class _Chosen:
    policy: Annotated[PolicyOptions, Field(discriminator="name")]


def policy_options(name: str, **settings: Any) -> PolicyOptions:
    """The options of the policy called `name`, with these settings and the defaults of all others.

    Raises ConfigError when there is no such policy, or a setting is unknown or wrong.
    """
    chosen, problems = validated(_Chosen, {"policy": {"name": name, **settings}})
    if chosen is None:
        raise ConfigError([f"{dotted(key)}: {what}" for key, what in problems])
    return chosen.policy


def policy(
    name: str, budget: Budget | None = None, *, selection_from: SelectionFrom = "tuned", **settings: Any
) -> Policy:
    """The policy called `name` at a budget (None: full memory); `settings` are those of `memory.policy` in a config.

    With `selection_from="base"` the model without its adapter judges what is kept.

    Raises ConfigError when there is no such policy, or a setting is unknown or wrong.
    """
    return replace(policy_options(name, **settings).build(budget), selection_from=selection_from)
