"""Operations of a program, counted in its trace: multiplications and additions of matrix products and convolutions.

Everything else (softmax, norms, activations) is left out, as in the papers' tables, which count a multiplication with
its addition as one "flop" where this counts two.
"""

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


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
    _add(jax.make_jaxpr(function)(*arguments).jaxpr, "", 1, totals)
    return dict(totals)


def flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating-point operations of a call, see `flops_by_module`."""
    return sum(flops_by_module(function, *arguments).values())


def _add(jaxpr: core.Jaxpr, prefix: str, times: int, totals: dict[str, int]) -> None:
    for equation in jaxpr.eqns:
        path = f"{prefix}/{equation.source_info.name_stack}"
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            totals[module_of(path)] += times * 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            numbers = params["dimension_numbers"]
            features = kernel.shape[numbers.rhs_spec[0]]
            # A strided convolution's gradient dilates its input; multiplications by these zeros are not counted.
            work = math.prod(out.shape) * math.prod(kernel.shape) // features // math.prod(params["lhs_dilation"])
            totals[module_of(path)] += times * 2 * work
        elif name == "cond":
            branches = [_counted(branch.jaxpr, path) for branch in params["branches"]]
            for module, count in max(branches, key=lambda counts: sum(counts.values())).items():
                totals[module] += times * count
        else:
            again = times * params["length"] if name == "scan" else times
            for inner in core.jaxprs_in_params(params):
                _add(inner, path, again, totals)


def _counted(jaxpr: core.Jaxpr, prefix: str) -> dict[str, int]:
    totals: dict[str, int] = collections.Counter()
    _add(jaxpr, prefix, 1, totals)
    return totals


def module_of(path: str) -> str:
    """A name stack as a module's path: without transformations' marks, layers of one name together."""
    names = re.sub(r"\b(?:jvp|transpose|vmap|checkpoint|rematted_computation)\b", "", path)
    parts = [part for part in re.split(r"[/().]+", names) if part and part[0].islower()]
    parts = [re.sub(r"^(cycle|block|scale|first_block|last_block|layer)s?\d*$", r"\1", part) for part in parts]
    return "/".join(parts) or "other"
