"""Times are those by hand: each operation's by what bounds it, collectives' by links, what overlaps once."""

import numpy as np
import pytest

from walt_jax.parallel.hardware import HARDWARE
from walt_jax.parallel.hlo import Operation, Product
from walt_jax.parallel.roofline import Links, estimate, module_part, unit_seconds

V5E = HARDWARE["v5e"]


def torus(*shape, slices=1, hardware=V5E):
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape))
    return Links(hardware, np.tile(places, (slices, 1)), np.repeat(np.arange(slices), len(places)), shape)


def operation(flops=0, side=1024, hbm=0, times=1, **more):
    products = [Product(flops, (side, side, side))] if flops else []
    return Operation("jit(step)/Denoiser/mlp/dot_general", times, products, hbm, 0, "main", **more)


def collective(size, kind="all-gather", overlaps=False, times=1):
    return Operation("", times, [], 0, 0, "main", kind, size, None, overlaps)


def test_an_operation_takes_what_the_slower_of_flops_and_memory_does():
    found = estimate([operation(197 * 10**9, hbm=1), operation(1, hbm=819 * 10**6, times=2)], torus(2, 2))
    assert found.bound == pytest.approx({"FLOPs": 1e-3, "HBM": 2e-3, "ICI": 0, "DCN": 0})
    assert found.seconds == pytest.approx(3e-3)
    assert found.bound_by == "HBM"
    assert found.parts["Denoiser/mlp forward"]["FLOPs"] == pytest.approx(1e-3)
    assert (found.flops, found.hbm_bytes) == (197 * 10**9 + 2, 1 + 2 * 819 * 10**6)


@pytest.mark.parametrize(
    ("sides", "padding"), [((256, 128, 128), 1), ((256, 256, 64), 2), ((256, 64, 128), 1), ((64, 32, 128), 2)]
)
def test_sides_are_padded_to_the_matrix_unit(sides, padding):
    """Of rows and columns only the one that fits better."""
    assert unit_seconds(Product(1000, sides), V5E) == pytest.approx(padding * 1000 / V5E.peak_flops)


LINK = 45e9  # v5e, one way


@pytest.mark.parametrize(
    ("shape", "kind", "seconds"),
    [
        ((4, 4), "all-gather", 15 / 16 / (2 * LINK)),  # a line along each of two axes
        ((16, 16), "all-gather", 255 / 256 / (4 * LINK)),  # rings
        ((4, 1), "reduce-scatter", 3 / 4 / LINK),
        ((4, 1), "all-reduce", 2 * 3 / 4 / LINK),
        ((4, 1), "all-to-all", 1 / LINK),
        ((4, 1), "collective-permute", 1 / LINK),
    ],
)
def test_collectives_within_a_slice(shape, kind, seconds):
    assert torus(*shape).seconds(kind, 1.0, None) == pytest.approx({"ICI": seconds, "DCN": 0})


def test_a_group_along_one_axis_uses_its_links_only():
    assert torus(4, 4).seconds("all-gather", 1.0, np.arange(4))["ICI"] == pytest.approx(3 / 4 / LINK)


def test_across_slices_each_device_sends_its_part():
    found = torus(2, 2, slices=2).seconds("all-reduce", 1.0, None)
    assert found["DCN"] == pytest.approx(1 / 4 * 2 * (1 / 2) / (25e9 / 8))
    assert found["ICI"] == pytest.approx(2 * 3 / 4 / (2 * LINK))


def test_gpus_of_a_host_are_switched():
    h100 = HARDWARE["h100"]
    links = Links(h100, np.arange(16)[:, None] % 8, np.arange(16) // 8, ())
    assert links.seconds("all-gather", 1.0, np.arange(8)) == pytest.approx({"ICI": 7 / 8 / 450e9, "DCN": 0})
    assert links.seconds("all-gather", 1.0, np.array([0, 8]))["DCN"] == pytest.approx(1 / 2 / 50e9)


def test_what_overlaps_counts_where_it_is_longer_only():
    work = operation(197 * 10**9)  # 1 ms
    waits = lambda size, **more: estimate([work, collective(size, **more)], torus(2, 1)).seconds  # noqa: E731
    half_ms = round(LINK * 1e-3)  # half of an array crosses the link
    assert waits(half_ms) == pytest.approx(1.5e-3)
    assert waits(half_ms, overlaps=True) == pytest.approx(1e-3)
    found = estimate([work, collective(6 * half_ms, overlaps=True)], torus(2, 1))
    assert found.seconds == pytest.approx(3e-3)
    assert found.bound["ICI"] == pytest.approx(2e-3)
    assert found.bound_by == "ICI"


def test_bytes_of_collectives_by_kind():
    done = [collective(8, times=24), collective(4, "reduce-scatter", times=24), collective(2)]
    found = estimate(done, torus(2, 2, slices=2))
    assert found.collective_bytes == {"all-gather": 8 * 24 + 2, "reduce-scatter": 96}
    assert found.dcn_bytes == 8 * 24 + 2 + 96


def test_the_compilers_cycles_make_a_second_estimate():
    slow = Operation("jit(f)/softmax", 3, [], 0, round(V5E.clock_hz * 1e-3), "main")
    found = estimate([slow, operation(197 * 10**9)], torus(2, 1))
    assert (found.seconds, found.compiler_seconds) == pytest.approx((1e-3, 4e-3), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(train_step)/jvp(Denoiser)/cycles/while/body/block0/mlp/mlp_in/dot_general", "mlp/mlp_in forward"),
        ("jit(train_step)/transpose(jvp(Denoiser))/patch_in/dot_general", "Denoiser/patch_in backward"),
        ("jit(f)/transpose(jvp(D))/block1/checkpoint/rematted_computation/mlp/dot_general", "block/mlp recomputed"),
        ("jit(train_step)/optimizer/mul", "optimizer"),
        ("jit(train_step)/reduce_sum", "loss, norms, average"),
    ],
)
def test_parts(name, part):
    assert module_part(name) == part
