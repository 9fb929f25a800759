"""A program's operations and memory from its trace, for devices that no compiler here knows: upper and rough bounds."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from walt_jax.parallel.hlo import Operation, Product

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin", "cumsum", "sort")


def traced(function: Callable[..., Any], *arguments: Any) -> core.Jaxpr:
    """The trace of a function of arrays, or of their shapes."""
    return jax.make_jaxpr(function)(*arguments).jaxpr


# The scope of products that only move values, by a matrix of zeros and ones: they are not counted as a model's.
MOVES = "moves"


def operations(jaxpr: core.Jaxpr, prefix: str = "", times: int = 1) -> list[Operation]:
    """What one device does that has all of it: matrix products, convolutions and reductions.

    Everything else is taken to be fused with what reads it. A scan's operations count as often as it runs, a
    conditional's are those of the branch with most work, a loop of unknown length counts once. A strided convolution's
    gradient dilates its input; multiplications by these zeros are not counted.
    """
    found: list[Operation] = []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        path = f"{prefix}/{equation.source_info.name_stack}"
        moved = sum(_bytes(v) for v in (*equation.invars, *equation.outvars))
        if name in ("dot_general", "conv_general_dilated"):
            work = [_dot(equation) if name == "dot_general" else _convolution(equation)]
            work = [] if MOVES in re.split(r"[/().]+", path) else work
            found.append(Operation(f"{path}/{name}", times, work, moved, 0, ""))
        elif name in REDUCTIONS:
            found.append(Operation(f"{path}/{name}", times, [], moved, 0, ""))
        elif name == "pallas_call" and params["cost_estimate"] is not None:
            cost = params["cost_estimate"]
            work = [Product(int(cost.flops), (0, 0, 0))]
            found.append(Operation(f"{path}/{name}", times, work, int(cost.bytes_accessed), 0, ""))
        elif name == "cond":
            branches = [operations(branch.jaxpr, path, times) for branch in params["branches"]]
            found += max(branches, key=lambda each: sum(operation.flops for operation in each))
        else:
            again = times * params["length"] if name == "scan" else times
            for inner in core.jaxprs_in_params(params):
                found += operations(inner, path, again)
    return found


def _dot(equation: core.JaxprEqn) -> Product:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    depth, stack = (math.prod(left[axis] for axis in axes) for axes in (contracted, batch))
    rows = math.prod(left) // max(1, depth * stack)
    columns = math.prod(out) // max(1, stack * rows)
    return Product(2 * math.prod(out) * depth, (rows, columns, depth))


def _convolution(equation: core.JaxprEqn) -> Product:
    kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    numbers = equation.params["dimension_numbers"]
    features, depth = kernel[numbers.rhs_spec[0]], kernel[numbers.rhs_spec[1]]
    work = 2 * math.prod(out) * math.prod(kernel) // features // math.prod(equation.params["lhs_dilation"])
    return Product(work, (math.prod(out) // features, features, depth))


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """Most bytes of intermediate arrays at one time if operations run one after the other in the traced order.

    The arguments are not counted, results are. A compiler fuses operations, so needs less for element-wise chains.
    """
    last: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        for variable in equation.invars:
            if isinstance(variable, core.Var):
                last[variable] = number
    results = {variable for variable in jaxpr.outvars if isinstance(variable, core.Var)}
    arguments = {*jaxpr.invars, *jaxpr.constvars}
    live = peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        made = sum(_bytes(variable) for variable in equation.outvars)
        inside = max((_inner_peak(equation, inner) for inner in core.jaxprs_in_params(equation.params)), default=0)
        peak = max(peak, live + max(made, inside))
        live += made
        for variable in {v for v in (*equation.invars, *equation.outvars) if isinstance(v, core.Var)}:
            if last.get(variable, number) == number and variable not in results | arguments:
                live -= _bytes(variable)
    return max(peak, live)


def _inner_peak(equation: core.JaxprEqn, inner: core.Jaxpr) -> int:
    """Of an operation that runs a program; a scan's stacked results are there as a whole."""
    if equation.primitive.name != "scan":
        return peak_bytes(inner)
    carried = equation.params["num_carry"]
    return peak_bytes(inner) + sum(_bytes(variable) for variable in equation.outvars[carried:])


def _bytes(variable: Any) -> int:
    aval = variable.aval
    if not hasattr(aval, "shape") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return 0
    return math.prod(aval.shape) * aval.dtype.itemsize
