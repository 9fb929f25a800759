"""Meshes of devices that are not there: which axes they have, how parameters and optimizer states lie on them."""

import dataclasses
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_shardings import FOLDER, TABLES, table
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from walt_jax.config import build
from walt_jax.errors import UserError
from walt_jax.parallel.mesh import AXES, MeshConfig, batch_shardings, described, make_mesh
from walt_jax.parallel.rules import DEFAULT_RULES, Rules, check_rules, constrain, like_parameters, mesh_axes, shardings
from walt_jax.training.optimizer import OptimizerConfig, make_optimizer


class Device(types.SimpleNamespace):
    __hash__ = object.__hash__


def devices(count, slices=1):
    kinds = {"platform": "gpu", "device_kind": "NVIDIA H100"}
    return [Device(id=i, process_index=i * slices // count, slice_index=i * slices // count, **kinds)
            for i in range(count)]  # fmt: skip


def abstract(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


def test_the_axis_of_minus_one_takes_what_is_left():
    assert dict(make_mesh(MeshConfig(), devices(8)).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2), devices(8))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert described(mesh.shape) == "fsdp 4 × tensor 2"
    assert set(mesh.axis_types) == {AxisType.Auto}
    part = make_mesh(MeshConfig(data=2), devices(8))
    assert [device.id for device in part.devices.flat] == [0, 1]
    assert described(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == "1 device"


def test_only_data_spans_slices():
    mesh = make_mesh(MeshConfig(fsdp=4), devices(16, slices=2))
    assert mesh.devices.shape == (4, 4, 1, 1)
    assert [[device.slice_index for device in row] for row in mesh.devices[:, :, 0, 0]] == [[0] * 4] * 2 + [[1] * 4] * 2


WRONG = [
    (
        {"fsdp": 3},
        8,
        1,
        "needs a multiple of 3 devices (fsdp=3), and there are 8; choose sizes whose product",
    ),
    ({"data": 4, "tensor": 4}, 8, 1, "needs 16 devices (data=4, tensor=4), and there are 8"),
    ({"fsdp": 16}, 16, 2, "config.mesh.data is 1, and there are 2 slices of 8 devices"),
    ({"data": 2}, 16, 2, "config.mesh.data is 2, and there are 2 slices of 8"),
    ({"slices": 4}, 16, 2, "config.mesh.slices is 4, and the devices are in 2; set it to 2."),
]


@pytest.mark.parametrize("sizes, count, slices, sentence", WRONG)
def test_a_mesh_that_does_not_fit_is_a_sentence(sizes, count, slices, sentence):
    with pytest.raises(UserError) as found:
        make_mesh(MeshConfig(**sizes), devices(count, slices))
    assert sentence in str(found.value)


@pytest.mark.parametrize("knobs, sentence", [({"fsdp": -1}, "data and fsdp are -1"), ({"tensor": 0}, "tensor is 0")])
def test_knobs_that_make_no_mesh(knobs, sentence):
    with pytest.raises(UserError, match=sentence):
        build(MeshConfig, knobs, "config.mesh")


def test_the_first_row_whose_axes_are_free_holds():
    assert mesh_axes(("embed", "heads")) == [("fsdp",), ("tensor",)]
    assert mesh_axes((None, "embed", "embed")) == [(), ("fsdp",), ()]
    assert mesh_axes(("mlp", "heads"), (("heads", "context"),)) == [("tensor",), ("context",)]
    assert mesh_axes(("heads", "mlp"), (("mlp", "tensor"), ("mlp", "fsdp"))) == [("tensor",), ("fsdp",)]
    assert mesh_axes(("embed",), (("embed", None),)) == [()]
    with pytest.raises(UserError, match="no row for the logical axis 'nothing'"):
        mesh_axes(("nothing",))


def test_rules_that_name_what_is_not_there():
    check_rules((("embed", ("data", "fsdp")),), abstract(1, 1, 1, 1))
    for rules, sentence in [((("embbed", None),), "row for 'embbed'"), ((("embed", "model"),), "'embed' to 'model'")]:
        with pytest.raises(UserError, match=sentence):
            check_rules(rules, abstract(1, 1, 1, 1))


@dataclasses.dataclass(frozen=True)
class Knobs:
    rules: Rules = ()


def test_rules_in_a_config():
    knobs = {"rules": [["embed", ["data", "fsdp"]], ["mlp", "tensor"], ["heads", None]]}
    built = build(Knobs, knobs, "config")
    assert built.rules == (("embed", ("data", "fsdp")), ("mlp", "tensor"), ("heads", None))
    hash(built.rules)
    assert build(Knobs, {"rules": [list(row) for row in DEFAULT_RULES]}, "config").rules == DEFAULT_RULES


def boxed(*names, shape):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


PARAMS = {
    "block": {
        "kernel": boxed("layers", "embed", "mlp", shape=(2, 32, 64)),
        "square": boxed("embed", "heads", shape=(32, 32)),
        "wide": boxed("embed", "embed_out", shape=(256, 512)),
        "bias": boxed("mlp", shape=(64,)),
    },
    "kernel": boxed("latent", "embed", shape=(6, 32)),
    "plain": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def test_parameters_lie_as_their_names_say():
    found = jax.tree.map(lambda sharding: sharding.spec, shardings(PARAMS, abstract(2, 4, 2, 1)))
    assert found["block"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert found["block"]["bias"] == PartitionSpec("tensor")
    assert found["kernel"] == PartitionSpec(None, "fsdp") and found["plain"] == PartitionSpec()
    alone = shardings(PARAMS, abstract(8, 1, 1, 1))
    assert all(sharding.spec == PartitionSpec() for sharding in jax.tree.leaves(alone))
    both = shardings(PARAMS, abstract(2, 4, 1, 1), (("embed", ("data", "fsdp")),))
    assert both["kernel"].spec == PartitionSpec(None, ("data", "fsdp"))
    assert both["kernel"].shard_shape((6, 32)) == (6, 4)


def test_an_axis_that_does_not_divide_is_a_sentence():
    with pytest.raises(UserError) as found:
        shardings(PARAMS, abstract(1, 3, 1, 1))
    assert str(found.value).startswith("block/kernel has 32 along 'embed', which config.mesh.fsdp=3 does not divide;")
    shardings(PARAMS, abstract(1, 3, 1, 1), (("embed", None),))


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_optimizer_states_lie_as_their_parameters(name):
    mesh = abstract(2, 4, 2, 1)
    named = {"block": PARAMS["block"], "kernel": PARAMS["kernel"]}
    divided, params = shardings(named, mesh), nn.meta.unbox(named)
    state = jax.eval_shape(make_optimizer(OptimizerConfig(name, 1e-3), 10, named).init, params)
    found = like_parameters(state, params, divided, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    block = PartitionSpec(None, "fsdp", "tensor")
    specs = {params["block"]["kernel"].shape: block, (256, 512): PartitionSpec("fsdp", "tensor")}
    counted = 0
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        if leaf.shape in specs:
            assert sharding.spec == specs[leaf.shape]
            counted += 1
        if name == "adafactor" and leaf.shape in [(256,), (512,)]:
            assert sharding.spec == PartitionSpec({256: "fsdp", 512: "tensor"}[leaf.shape[0]])
            counted += 1
    assert counted == {"adamw": 4, "muon": 2, "adafactor": 3}[name]
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    total = sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    assert total < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(state))


def test_batches_are_divided_over_data_and_fsdp():
    mesh, pack = abstract(2, 4, 2, 1), {"positions": np.zeros((8, 5, 4)), "groups": np.zeros((8, 7))}
    found = batch_shardings({"latents": np.zeros((16, 3)), "pack": pack}, mesh)
    assert {leaf.spec for leaf in jax.tree.leaves(found)} == {PartitionSpec(("data", "fsdp"))}
    with pytest.raises(UserError, match=r"A batch has 4 rows, which .*data=2 × fsdp=4 does not .*mesh.data=1."):
        batch_shardings({"latents": np.zeros((4, 3))}, mesh)
    with pytest.raises(UserError, match=r"has 6 rows, .* a multiple of 8, or make the axes smaller."):
        batch_shardings({"latents": np.zeros((6, 3))}, mesh)


def test_without_a_mesh_nothing_is_constrained():
    jaxpr = jax.make_jaxpr(lambda x: constrain(x, "batch", "tokens"))(jnp.zeros((4, 4)))
    assert not jaxpr.eqns


@pytest.mark.parametrize("name", TABLES)
def test_states_of_published_models_lie_as_reviewed(name):
    """After a change that is meant: `python tests/golden/make_shardings.py`, and read what differs."""
    assert table(name) == (FOLDER / f"{name}.json").read_text()
