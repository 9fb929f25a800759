"""Operations of a program, counted in its trace: multiplications and additions of matrix products and convolutions.

Everything else (softmax, norms, activations) is left out, as in the papers' tables, which count a multiplication with
its addition as one "flop" where this counts two.
"""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from walt_jax.parallel.analysis import operations, traced


def flops_by_module(function: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Floating-point operations of a call, by the path of the Flax module that asks for them.

    A scan counts as often as it runs; of branches the most expensive one counts; a loop of unknown length counts once.

    Args:
        function: traced, not run.
        arguments: arrays or their `jax.ShapeDtypeStruct`s.

    Returns:
        {"blocks/self_attention/query": …}: layers of one name count together ("cycle0", "cycle1" as "cycle").
    """
    totals: dict[str, int] = collections.Counter()
    for each in operations(traced(function, *arguments)):
        if each.products:
            totals[module_of(each.op_name.rsplit("/", 1)[0])] += each.flops
    return dict(totals)


def jaxpr_flops(jaxpr: core.Jaxpr, leave_out: Sequence[str] = ()) -> int:
    """Floating-point operations of a program that is traced already.

    Args:
        jaxpr: the program.
        leave_out: name scopes whose operations are not counted.
    """
    left = set(leave_out)
    return sum(each.flops for each in operations(jaxpr) if left.isdisjoint(re.split(r"[/().]+", each.op_name)))


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations of a call, see `flops_by_module`."""
    return sum(flops_by_module(function, *arguments).values())


def module_of(path: str) -> str:
    """A name stack as a module's path: without transformations' marks, layers of one name together."""
    names = re.sub(r"\b(?:jvp|transpose|vmap|checkpoint|rematted_computation)\b", "", path)
    parts = [part for part in re.split(r"[/().]+", names) if part and part[0].islower()]
    parts = [re.sub(r"^(cycle|block|scale|first_block|last_block|layer)s?\d*$", r"\1", part) for part in parts]
    return "/".join(parts) or "other"
