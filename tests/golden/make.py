"""Writes the golden archives: what torch's own layers compute, in double precision.

    pip install torch opacus
    python -m tests.golden.make

Only for this script is torch needed. The grids are those of the libraries whose layers these
replace; sizes that change nothing but sums take turns instead of being crossed.
"""

# pyright: reportMissingImports=false

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import opacus.layers
import torch

from tests.golden.cases import Golden, masks, save

Cases = Iterator[Golden]


def module(name: str, options: dict[str, Any]) -> torch.nn.Module:
    """Torch's layer for one of ours."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    classes = {
        "linear": torch.nn.Linear,
        "conv_linear": torch.nn.Linear,
        "embedding": torch.nn.Embedding,
        "layer_norm": torch.nn.LayerNorm,
        "rms_norm": torch.nn.RMSNorm,
        "group_norm": torch.nn.GroupNorm,
        "lstm": torch.nn.LSTM,
        "gru": torch.nn.GRU,
        "rnn": torch.nn.RNN,
        "multi_head_attention": torch.nn.MultiheadAttention,
        "prelu": torch.nn.PReLU,
    }
    if name in ("lstm", "gru", "rnn", "multi_head_attention"):
        options["batch_first"] = True
    made = classes[name] if name in classes else getattr(torch.nn, _camel(name))
    return made(**options).double()


def _camel(name: str) -> str:
    """`conv_transpose2d -> ConvTranspose2d`."""
    return "".join(part.capitalize() for part in name.split("_"))


def loaded(case: Golden, torch_module: torch.nn.Module) -> torch.nn.Module:
    """The module with the weights of the case."""
    torch_module.load_state_dict({k: torch.tensor(v) for k, v in case.state_dict().items()})
    return torch_module


def draft(
    name: str,
    layer: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
    batch_size: int = 2,
    torch_module: Any = None,
    **settings: Any,
) -> tuple[Golden, torch.nn.Module]:
    """A case without outputs, and torch's module with its weights."""
    torch_module = module(layer, options) if torch_module is None else torch_module
    shapes = {name: list(array.shape) for name, array in torch_module.state_dict().items()}
    case = Golden(name, layer, options, shapes, inputs, batch_size, settings)
    return case, loaded(case, torch_module)


def first(x: np.ndarray) -> torch.Tensor:
    """Channels from last to first."""
    return torch.tensor(np.moveaxis(x, -1, 1))


def last(y: torch.Tensor) -> np.ndarray:
    """Channels from first to last."""
    return np.moveaxis(y.detach().numpy(), 1, -1)


def convolved(case: Golden, torch_module: torch.nn.Module) -> Golden:
    """Of a layer that takes channels first."""
    return case._replace(outputs={"y": last(torch_module(first(case.examples()["x"])))})


def direct(case: Golden, torch_module: torch.nn.Module) -> Golden:
    """Of a layer that takes channels last."""
    x = torch.tensor(case.examples()["x"])
    return case._replace(outputs={"y": torch_module(x).detach().numpy()})


def linear() -> Cases:
    for layer, rank, bias in itertools.product(("linear", "conv_linear"), (1, 2, 3), (True, False)):
        options = {"in_features": 5, "out_features": 3, "bias": bias}
        name = f"{layer}-rank{rank}-bias{int(bias)}"
        yield direct(*draft(name, layer, options, {"x": [2, 3, 5][3 - rank :]}))


def _conv(rank: int, grid: dict[str, list[Any]], shapes: list[list[int]]) -> Cases:
    number, batch_size = 0, 2 if rank == 1 else 1
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        groups, channels = options["groups"], options.pop("channels")
        strided = options["stride"] not in (1, [1] * rank)
        if options["padding"] == "same" and strided:
            continue
        inputs = channels if channels % groups == 0 else channels * groups
        options |= {"in_channels": inputs, "out_channels": groups * (2 if groups < 3 else 1)}
        options["bias"] = number % 3 != 0
        shape = [*shapes[number % len(shapes)], inputs]
        name = f"conv{rank}d-{number:03}"
        number += 1
        try:
            yield convolved(*draft(name, f"conv{rank}d", options, {"x": shape}, batch_size))
        except RuntimeError as error:  # a kernel larger than the padded input
            assert "Kernel size can't be greater" in str(error), error


def conv1d() -> Cases:
    grid = {
        "channels": [1, 3, 32],
        "kernel_size": [2, 3],
        "stride": [1, 2],
        "padding": [0, 1, 2, "same", "valid"],
        "dilation": [1, 2],
        "groups": [1, 2, 3, 4, 12],
    }
    yield from _conv(1, grid, [[6], [7], [8], [9], [10]])


def conv2d() -> Cases:
    grid = {
        "channels": [1, 3],
        "kernel_size": [2, 3, 4],
        "stride": [1, 2],
        "padding": [0, 2, "same", "valid"],
        "dilation": [1, 2, 3],
        "groups": [1, 3, 16],
    }
    yield from _conv(2, grid, [[6, 5], [7, 6], [10, 7]])
    options = {"in_channels": 3, "out_channels": 4, "kernel_size": [3, 1], "dilation": [3, 1]}
    yield convolved(*draft("conv2d-tall", "conv2d", options, {"x": [8, 4, 3]}))


def conv3d() -> Cases:
    grid = {
        "channels": [2],
        "kernel_size": [2, 3, [1, 2, 3]],
        "stride": [1, 2, [1, 2, 3]],
        "padding": [0, 2, [1, 2, 3], "same", "valid"],
        "dilation": [1, [1, 2, 2]],
        "groups": [1, 2],
    }
    yield from _conv(3, grid, [[4, 5, 6], [5, 5, 5]])


def padding_modes() -> Cases:
    kinds = [(1, [7], 3), (2, [6, 7], 3), (3, [4, 5, 4], 2)]
    modes = ("reflect", "replicate", "circular")
    for (rank, shape, kernel), mode, padding in itertools.product(kinds, modes, (1, "same", 0)):
        if (rank, mode, padding) == (3, "reflect", "same"):
            continue  # torch has no asymmetric reflection of three axes
        options = {"in_channels": 2, "out_channels": 3, "kernel_size": kernel, "padding": padding}
        options |= {"padding_mode": mode, "dilation": 2 if rank < 3 else 1}
        name = f"conv{rank}d-{mode}-{padding}"
        yield convolved(*draft(name, f"conv{rank}d", options, {"x": [*shape, 2]}))


def conv_transpose() -> Cases:
    grid = itertools.product((1, 2, 3), (2, 3), (1, 2, 3), (0, 1), (1, 2), (1, 2, 3))
    for number, (rank, kernel, stride, padding, dilation, groups) in enumerate(grid):
        if rank == 3 and number % 3:
            continue
        options = {"in_channels": 6, "out_channels": groups * (1 + number % 2)}
        options |= {"kernel_size": kernel, "stride": stride, "padding": padding, "groups": groups}
        options |= {"dilation": dilation, "output_padding": (stride - 1) * (number % 2)}
        options["bias"] = number % 3 != 0
        layer = f"conv_transpose{rank}d"
        shape = [[5], [3, 4], [2, 3, 2]][rank - 1]
        yield convolved(*draft(f"{layer}-{number:03}", layer, options, {"x": [*shape, 6]}))


def embedding() -> Cases:
    grid = itertools.product((2, 5, 32), (None, 1, -1), (None, 0.7), (2.0, 1.0), (False, True))
    for number, (rows, padding, max_norm, norm_type, by_frequency) in enumerate(grid):
        options = {"num_embeddings": rows, "embedding_dim": 4, "padding_idx": padding}
        options |= {"max_norm": max_norm, "norm_type": norm_type}
        options["scale_grad_by_freq"] = by_frequency
        ids = {"x": {"high": rows, "shape": [(), (3,), (6,), (2, 4)][number % 4]}}
        case, layer = draft(f"embedding-{number:02}", "embedding", options, ids)
        yield case._replace(outputs=_one_by_one(case, layer))


def _one_by_one(case: Golden, layer: torch.nn.Module) -> dict[str, np.ndarray]:
    """Outputs y and the gradients of sums of y² / 2, each example alone and from the same table:
    torch overwrites the rows that are too long."""
    outputs, grads = [], []
    for ids in case.examples()["x"]:
        fresh = loaded(case, layer)
        fresh.zero_grad()
        y = fresh(torch.tensor(ids))
        (y**2).sum().div(2).backward()
        outputs.append(y.detach().numpy())
        grads.append(fresh.weight.grad.numpy().copy())
    return {"y": np.stack(outputs), "grad": np.stack(grads)}


def normalization() -> Cases:
    shapes = [[5], [3, 5], [2, 3, 5]]
    for dims, affine, bias in itertools.product((1, 2, 3), (True, False), (True, False)):
        options = {"normalized_shape": shapes[dims - 1], "elementwise_affine": affine}
        name = f"{dims}d-affine{int(affine)}-bias{int(bias)}"
        inputs = {"x": [2, *shapes[dims - 1]][dims % 2 :]}
        if bias:
            eps = {"eps": 1e-2} if dims == 2 else {}
            yield direct(*draft(f"rms_norm-{name}", "rms_norm", options | eps, inputs))
        yield direct(*draft(f"layer_norm-{name}", "layer_norm", options | {"bias": bias}, inputs))
    spatial = [[4], [3, 4], [2, 3, 4]]
    for rank, affine in itertools.product((1, 2, 3), (True, False)):
        for groups in (1, 4, 8):
            options = {"num_groups": groups, "num_channels": 8, "affine": affine}
            name = f"group_norm-{rank}d-groups{groups}-affine{int(affine)}"
            inputs = {"x": [*spatial[rank - 1], 8]}
            yield convolved(*draft(name, "group_norm", options, inputs))
        options = {"num_features": 3, "affine": affine}
        torch_module = module(f"instance_norm{rank}d", options)
        name, inputs = f"instance_norm-{rank}d-affine{int(affine)}", {"x": [*spatial[rank - 1], 3]}
        yield convolved(*draft(name, "instance_norm", options, inputs, torch_module=torch_module))


def recurrent() -> Cases:
    grid = itertools.product(
        ("lstm", "gru", "rnn", "relu"), (1, 2, 3), (False, True), (True, False), (False, True)
    )
    for number, (kind, layers, bidirectional, bias, ragged) in enumerate(grid):
        options = {"input_size": 3, "hidden_size": 4, "num_layers": layers, "bias": bias}
        options["bidirectional"] = bidirectional
        if kind == "relu":
            options["nonlinearity"] = "relu"
        layer, steps = "rnn" if kind == "relu" else kind, 1 + number // 2 % 6
        lengths = [steps, max(1, steps - 2), 1] if ragged else [steps] * 3
        yield _recurrent(f"{kind}-{number:03}", layer, options, lengths, number % 3 == 0)
    # Dropout of everything: only the last layer's biases and states are left where it is placed.
    for layer, layers in itertools.product(("lstm", "gru", "rnn"), (1, 2, 3)):
        options = {"input_size": 3, "hidden_size": 4, "num_layers": layers, "dropout": 1.0}
        yield _recurrent(f"{layer}-dropout-{layers}", layer, options, [3] * 3, False)


def _recurrent(
    name: str, layer: str, options: dict[str, Any], lengths: list[int], state: bool
) -> Golden:
    directions = 2 if options.get("bidirectional") else 1
    carried = [options["num_layers"] * directions, 4]
    inputs: dict[str, Any] = {"x": [max(lengths), 3]}
    if state:
        inputs |= {"h": carried, "c": carried} if layer == "lstm" else {"h": carried}
    case, torch_module = draft(name, layer, options, inputs, len(lengths), lengths=lengths)
    arrays = {key: torch.tensor(array) for key, array in case.examples().items()}
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        arrays["x"], torch.tensor(lengths), batch_first=True
    )
    given = [arrays[key].transpose(0, 1).contiguous() for key in ("h", "c") if key in arrays]
    start = (tuple(given) if layer == "lstm" else given[0]) if given else None
    packed, final = torch_module(packed, start)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    final = final if layer == "lstm" else (final,)
    ends = {key: f.transpose(0, 1).detach().numpy() for key, f in zip("hc", final, strict=False)}
    return case._replace(outputs={"y": y.detach().numpy()} | ends)


def attention() -> Cases:
    kinds = ("none", "causal", "pairs", "heads", "keys")
    grid = itertools.product((1, 2, 3), (False, True), kinds, (True, False))
    for number, (heads, apart, mask, bias) in enumerate(grid):
        options = {"embed_dim": 6, "num_heads": heads, "bias": bias}
        options |= {"add_bias_kv": number % 3 == 1, "add_zero_attn": number % 4 == 2}
        inputs = {"queries": [4, 6]}
        if apart:
            options |= {"kdim": 5, "vdim": 3}
            inputs |= {"keys": [5, 5], "values": [5, 3]}
        case, layer = draft(
            f"attention-{number:02}", "multi_head_attention", options, inputs, mask=mask
        )
        yield _attended(case, layer)
    for number, (bias_kv, zero) in enumerate(itertools.product((False, True), repeat=2)):
        options = {"embed_dim": 6, "num_heads": 2, "add_bias_kv": bias_kv, "add_zero_attn": zero}
        # With batch_first it interleaves heads and positions of its result (Opacus 1.6).
        torch_module = opacus.layers.DPMultiheadAttention(batch_first=False, **options).double()
        yield _attended(
            *draft(
                f"opacus-{number}", "multi_head_attention", options, {"queries": [4, 6]},
                torch_module=torch_module, mask="none",
            )
        )  # fmt: skip


def _attended(case: Golden, layer: torch.nn.Module) -> Golden:
    arrays = {key: torch.tensor(array) for key, array in case.examples().items()}
    q = arrays["queries"]
    k, v = arrays.get("keys", q), arrays.get("values", q)
    given = masks(case)
    causal = np.tri(q.shape[1], k.shape[1], dtype=bool) if "is_causal" in given else None
    allowed = given.get("mask", causal)
    options: dict[str, Any] = {"need_weights": False}
    if allowed is not None:
        hidden = torch.tensor(~allowed)
        options["attn_mask"] = hidden.repeat(len(q), 1, 1) if hidden.ndim == 3 else hidden
    if "key_mask" in given:
        options["key_padding_mask"] = torch.tensor(~given["key_mask"]).expand(len(q), -1)
    batch = 0 if layer.batch_first else 1
    y, _ = layer(*(x.transpose(0, batch) for x in (q, k, v)), **options)
    return case._replace(outputs={"y": y.transpose(0, batch).detach().numpy()})


def pooling() -> Cases:
    shapes = [[9], [7, 8], [5, 6, 4]]
    pools: list[tuple[str, dict[str, Any]]] = [
        ("max_pool", {"kernel_size": 2}),
        ("max_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("max_pool", {"kernel_size": 2, "stride": 1, "dilation": 2}),
        ("avg_pool", {"kernel_size": 2}),
        ("avg_pool", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("avg_pool", {"kernel_size": 3, "padding": 1, "count_include_pad": False}),
        ("adaptive_avg_pool", {"output_size": 1}),
        ("adaptive_avg_pool", {"output_size": 3}),
    ]
    for rank, (number, (layer, options)) in itertools.product((1, 2, 3), enumerate(pools)):
        torch_module = module(f"{layer}{rank}d", options)
        inputs = {"x": [*shapes[rank - 1], 2]}
        name = f"{layer}-{rank}d-{number}"
        yield convolved(*draft(name, layer, options, inputs, torch_module=torch_module))


def activations() -> Cases:
    ours = {
        "celu": torch.nn.CELU(),
        "elu": torch.nn.ELU(),
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU("tanh"),
        "glu": torch.nn.GLU(),
        "hard_sigmoid": torch.nn.Hardsigmoid(),
        "hard_swish": torch.nn.Hardswish(),
        "hard_tanh": torch.nn.Hardtanh(),
        "leaky_relu": torch.nn.LeakyReLU(),
        "log_sigmoid": torch.nn.LogSigmoid(),
        "log_softmax": torch.nn.LogSoftmax(-1),
        "mish": torch.nn.Mish(),
        "relu": torch.nn.ReLU(),
        "relu6": torch.nn.ReLU6(),
        "selu": torch.nn.SELU(),
        "sigmoid": torch.nn.Sigmoid(),
        "silu": torch.nn.SiLU(),
        "soft_sign": torch.nn.Softsign(),
        "softmax": torch.nn.Softmax(-1),
        "softplus": torch.nn.Softplus(),
        "tanh": torch.nn.Tanh(),
    }
    for layer, torch_module in ours.items():
        yield direct(*draft(layer, layer, {}, {"x": [5, 6]}, torch_module=torch_module))
    for count in (1, 4):
        options = {"num_parameters": count}
        yield convolved(*draft(f"prelu-{count}", "prelu", options, {"x": [5, 4]}))


def models() -> Cases:
    """As their libraries' users write them; `tests/nn/test_golden.py` has the same ones."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.GroupNorm(2, 4),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.ConvTranspose2d(4, 3, 2, stride=2),
        torch.nn.Flatten(),
        torch.nn.Linear(3 * 6 * 6, 5),
    ).double()
    yield convolved(*draft("cnn", "", {}, {"x": [6, 6, 2]}, torch_module=network))
    private = opacus.layers.DPLSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    case, _ = draft("opacus-lstm", "", {}, {"x": [5, 3]}, torch_module=private.double())
    y, _ = private(torch.tensor(case.examples()["x"]))
    yield case._replace(outputs={"y": y.detach().numpy()})


FAMILIES = (
    linear, conv1d, conv2d, conv3d, padding_modes, conv_transpose, embedding, normalization,
    recurrent, attention, pooling, activations, models,
)  # fmt: skip


def main() -> None:
    """Writes all archives beside this file."""
    for family in FAMILIES:
        cases = list(family())
        save(family.__name__, cases)
        print(f"{family.__name__}: {len(cases)} cases")


if __name__ == "__main__":
    main()
