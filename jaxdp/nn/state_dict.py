"""Trained weights of torch and Opacus models as parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.checks import check_instance
from jaxdp.nn.layer import Layer, Params, TorchName


def from_torch_state_dict(
    layer: Layer, state_dict: Mapping[str, Any], *, prefix: str = ""
) -> Params:
    """The parameters of a layer from a torch `state_dict`; torch need not be installed.

    The function translates names and layouts: torch keeps kernels as `[out, in, *window]` and packs
    the projections of an attention layer into one matrix. It knows the names of torch's layers and
    those of Opacus's DP layers; a `GradSampleModule` adds the prefix "_module.". Layers of a
    `sequential` are found under their names: "0", "1", ... or those that they were given. Inputs
    differ, too: here channels come last, see `flatten`.

    Args:
      layer: the layer that takes the parameters, with the sizes of the torch layer.
      state_dict: maps names to arrays, or to values that NumPy turns into arrays.
      prefix: prefix of the names that belong to the layer; other names are ignored.

    Returns:
      Parameters as `layer.init` returns them, in its dtypes.

    Raises:
      ValueError: a parameter that is missing or has another shape; a name under the prefix that
        belongs to no parameter (running statistics, for example); a layer without torch names.
      TypeError: a value that NumPy cannot read, such as torch's bfloat16.

    Example:
      >>> from jaxdp import nn
      >>> model = nn.sequential(nn.linear(2, 3), nn.relu)
      >>> weights = {"0.weight": np.ones((3, 2)), "0.bias": np.zeros(3)}
      >>> nn.from_torch_state_dict(model, weights)["0"]["kernel"].shape
      (2, 3)
    """
    check_instance("layer", layer, Layer, advice="Pass what a factory of jaxdp.nn returns.")
    advice = "Pass the state_dict() of a torch module."
    check_instance("state_dict", state_dict, Mapping, advice=advice)
    check_instance("prefix", prefix, str, advice="Pass what the names begin with.")
    given = {
        name.removeprefix(prefix): array
        for name, array in state_dict.items()
        if name.startswith(prefix)
    }
    leaves, treedef = jax.tree.flatten_with_path(jax.eval_shape(layer.init, jax.random.key(0)))
    used: set[str] = set()
    params = []
    for path, leaf in leaves:
        where = tuple(entry.key for entry in path)
        candidates = layer.torch_names.get(where, ())
        if not candidates:
            raise ValueError(
                f"parameter {'/'.join(where)} must have a torch name, got a layer without. Add it "
                "to the layer's torch_names."
            )
        # Opacus keeps some arrays under two names.
        found = [each for each in candidates if each.name in given]
        if not found:
            wanted = " or ".join(prefix + each.name for each in candidates)
            raise ValueError(
                f"state_dict must hold {wanted}, got {sorted(state_dict)}. Name the layer's part "
                "of it by prefix, and build the layer as the torch layer was built."
            )
        used |= {each.name for each in found}
        params.append(_converted(found[0], given[found[0].name], leaf))
    if unused := sorted(set(given) - used):
        raise ValueError(
            f"state_dict must hold nothing but the layer's parameters, got {unused}. Name the "
            "layer's part of it by prefix. Running statistics of a batch norm have no counterpart."
        )
    return jax.tree.unflatten(treedef, params)


def _converted(source: TorchName, value: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    try:
        array = np.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{source.name} must be an array that NumPy can read, got {type(value).__name__} "
            f"({error}). Convert bfloat16 tensors with .float()."
        ) from error
    try:
        converted = source.convert(array)
    except ValueError:  # from a reshape to sizes that do not fit
        converted = array
    if converted.shape != leaf.shape:
        raise ValueError(
            f"{source.name} must become a parameter of shape {leaf.shape}, got an array of shape "
            f"{array.shape}. Build the layer with the sizes of the torch layer."
        )
    return jnp.asarray(converted, leaf.dtype)
