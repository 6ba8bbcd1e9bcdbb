"""ONNX files are read as what they compute."""

import numpy as np
import pytest
import torch
from torch import nn

import crcbook as crc
from crcbook.networks import read_network

onnx = pytest.importorskip("onnx", reason="ONNX files need the onnx package")
GENERATOR = np.random.default_rng(0)


def written(path, nodes, constants, shape=("batch", 6), opset=17, inputs=("x",)):
    """A file of operations ``(kind, inputs, outputs, settings)``; the last one gives the logits."""
    made = [
        onnx.helper.make_node(kind, list(takes), list(gives), **settings)
        for kind, takes, gives, settings in nodes
    ]
    real = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        made,
        "network",
        [onnx.helper.make_tensor_value_info(name, real, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info(nodes[-1][2][0], real, [None, None])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    file.ir_version = 9
    onnx.save(file, path)
    return path


def numbers(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


def evaluated(path, x):
    """What ONNX's own evaluator says, an item at a time."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return torch.cat([torch.from_numpy(evaluator.run(None, {"x": i[None].numpy()})[0]) for i in x])


def check(path, x):
    model = crc.load_model(path)
    expected = evaluated(path, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    logits = read_network(model).logits(x.flatten(1).double())
    torch.testing.assert_close(logits.float(), expected, rtol=1e-4, atol=1e-5)


def test_a_convolutional_network_is_read(tmp_path):
    nodes = [
        ("Sub", ("x", "mean"), ("a",), {}),
        ("Div", ("a", "std"), ("b",), {}),
        ("Conv", ("b", "w1", "b1"), ("c",), {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
        ("BatchNormalization", ("c", "s", "t", "m", "v"), ("d",), {"epsilon": 1e-3}),
        ("Softplus", ("d",), ("e",), {}),
        ("Conv", ("e", "w2"), ("f",), {"group": 2, "kernel_shape": [2, 2]}),
        ("Sigmoid", ("f",), ("g",), {}),
        ("Mul", ("f", "g"), ("h",), {}),
        ("AveragePool", ("h",), ("i",), {"kernel_shape": [2, 2]}),
        ("Shape", ("i",), ("j",), {}),
        ("Gather", ("j", "zero"), ("k",), {"axis": 0}),
        ("Unsqueeze", ("k", "first"), ("l",), {}),
        ("Concat", ("l", "minus"), ("m2",), {"axis": 0}),
        ("Reshape", ("i", "m2"), ("n",), {}),
        ("Gemm", ("n", "w3", "b3"), ("o",), {"transB": 1}),
        ("Elu", ("o",), ("p",), {}),
        ("MatMul", ("p", "w4"), ("q",), {}),
        ("Add", ("q", "b4"), ("r",), {}),
        ("Softmax", ("r",), ("logits",), {"axis": 1}),
    ]
    constants = {
        "mean": np.float32(0.13), "std": np.float32(0.3), "w1": numbers(4, 1, 3, 3),
        "b1": numbers(4), "s": numbers(4), "t": numbers(4), "m": numbers(4),
        "v": numbers(4) ** 2 + 1, "w2": numbers(4, 2, 2, 2), "zero": np.array(0),
        "first": np.array([0]), "minus": np.array([-1]), "w3": numbers(5, 16), "b3": numbers(5),
        "w4": numbers(5, 3), "b4": numbers(3),
    }  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, constants, ("batch", 1, 8, 8))
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = crc.load_model(path)
    assert model.input_shape == (1, 8, 8)
    network = read_network(model)
    assert [layer.activation.name for layer in network.layers] == [
        *("softplus", "silu", "elu", "identity")
    ]
    expected = evaluated(path, x)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    probabilities = network.logits(x.flatten(1).double()).softmax(1).float()
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
    flat = read_network(model, at=x.flatten(1))  # the file knows better
    assert torch.equal(flat.layers[0].weight, network.layers[0].weight)


@pytest.mark.parametrize(
    ("kind", "settings", "opset"),
    [
        *(("Sigmoid", {}, 9), ("Tanh", {}, 9), ("Softplus", {}, 9), ("Softsign", {}, 9)),
        *(("Elu", {"alpha": 1.0}, 9), ("Celu", {"alpha": 0.5}, 12), ("Mish", {}, 18)),
        *(("Gelu", {}, 20), ("Gelu", {"approximate": "tanh"}, 20), ("Atan", {}, 9)),
    ],
)
def test_activations_and_a_fixed_batch_are_read(tmp_path, kind, settings, opset):
    nodes = [
        ("Reshape", ("x", "shape"), ("a",), {}),
        ("Gemm", ("a", "w1", "b1"), ("b",), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
        (kind, ("b",), ("c",), settings),
        ("Dropout", ("c",), ("d",), {}),
        ("Gemm", ("d", "w2", "b2"), ("logits",), {}),
    ]
    constants = {
        "shape": np.array([1, -1]), "w1": numbers(5, 6), "b1": numbers(5), "w2": numbers(5, 3),
        "b2": numbers(1, 3),
    }  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, constants, (1, 2, 3), opset)
    check(path, torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)))


def constant(name, *values, dtype=np.int64):
    """An operation that gives a constant."""
    array = onnx.numpy_helper.from_array(np.array(values, dtype=dtype))
    return ("Constant", (), (name,), {"value": array})


ON_IMAGES = {
    "pools that do not count their pads": [
        ("AveragePool", ("h",), ("m",), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]})
    ],
    "pools that count them": [
        ("AveragePool", ("h",), ("m",),
         {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1, "strides": [2, 2]})
    ],
    "reflected": [
        constant("one", 0, 0, 0, 1, 0, 0, 0, 1),
        ("Pad", ("h", "one"), ("m",), {"mode": "reflect"}),
    ],
    "folded": [  # the pads are worked out from constants
        constant("four", 4), constant("eight", 8), constant("one", 1),
        ("ConstantOfShape", ("four",), ("zeros",),
         {"value": onnx.numpy_helper.from_array(np.array([0], dtype=np.int64))}),
        ("Mod", ("eight", "four"), ("none",), {}), ("Sub", ("zeros", "none"), ("more",), {}),
        ("Concat", ("more", "zeros"), ("pads",), {"axis": 0}),
        ("Pad", ("h", "pads"), ("m",), {"mode": "edge"}),
    ],
    "transposed": [
        ("ConvTranspose", ("h", "back", "bias"), ("m",),
         {"strides": [2, 2], "pads": [1, 0, 1, 0], "output_padding": [1, 1]})
    ],
    "sliced": [
        constant("first", 3, -1), constant("last", 0, -100), constant("axes", 2, -1),
        constant("steps", -2, -1), ("Slice", ("h", "first", "last", "axes", "steps"), ("m",), {}),
    ],
    "sliced as it was": [
        constant("first", 1), constant("last", 3), ("Slice", ("h", "first", "last"), ("all",), {}),
        constant("one", 1), constant("end", 2**62),
        ("Slice", ("h", "one", "end", "one"), ("m",), {}),
    ],
    "split": [
        constant("sizes", 1, 3), ("Split", ("h", "sizes"), ("a", "b"), {"axis": 1}),
        ("Concat", ("b", "a"), ("m",), {"axis": 1}),
    ],
    "gathered": [constant("places", -1, 0), ("Gather", ("h", "places"), ("m",), {"axis": 1})],
    "summed": [
        constant("axes", 1), ("ReduceSum", ("h", "axes"), ("a",), {"keepdims": 1}),
        ("Sum", ("h", "a", "h"), ("m",), {}),
    ],
    "repeated": [
        constant("roi"), constant("factors", 1, 1, 2, 3, dtype=np.float32),
        ("Resize", ("h", "roi", "factors"), ("m",), {
            "mode": "nearest", "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }),
    ],
    "repeated to a size": [
        constant("size", 1, 4, 8, 8), ("Resize", ("h", "", "", "size"), ("m",), {}),
    ],
    "padded as by TensorFlow": [
        ("Conv", ("h", "side"), ("m",), {"auto_pad": "SAME_UPPER", "strides": [2, 2]})
    ],
    "padded before": [
        ("Conv", ("h", "even"), ("m",), {"auto_pad": "SAME_LOWER"})
    ],
    "windows": [constant("two", [0, 1], [1, 2]), ("Gather", ("h", "two"), ("m",), {"axis": 3})],
    "a residual block": [
        ("Conv", ("h", "side"), ("a",), {"pads": [1, 1, 1, 1]}), ("Sigmoid", ("a",), ("b",), {}),
        ("Add", ("b", "h"), ("c",), {}), ("Softplus", ("c",), ("m",), {}),
    ],
    "depth to space": [("DepthToSpace", ("h",), ("m",), {"blocksize": 2})],
    "depth to space, by columns": [
        ("DepthToSpace", ("h",), ("m",), {"blocksize": 2, "mode": "CRD"})
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ON_IMAGES)
def test_linear_operations_are_read(tmp_path, name):
    torch.manual_seed(0)
    constants = {"w": numbers(4, 1, 3, 3), "back": numbers(4, 2, 3, 3), "bias": numbers(2),
                 "side": numbers(4, 4, 3, 3), "even": numbers(2, 4, 2, 2)}  # fmt: skip
    nodes = [
        ("Conv", ("x", "w"), ("c",), {}), ("Tanh", ("c",), ("h",), {}), *ON_IMAGES[name],
        ("Flatten", ("m",), ("logits",), {}),
    ]  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, constants, ("batch", 1, 6, 6), opset=18)
    check(path, torch.rand(3, 1, 6, 6))


def test_equal_parts_and_all_items_are_read(tmp_path):
    nodes = [
        constant("first", 0), constant("last", 2**31 - 1),
        ("Slice", ("x", "first", "last"), ("all",), {}),
        ("Split", ("all",), ("a", "b", "c"), {"axis": 1}),
        ("Sum", ("a", "c", "b"), ("s",), {}), constant("axes", -1),
        ("ReduceSum", ("s", "axes"), ("t",), {"noop_with_empty_axes": 1}),
        ("Gemm", ("t", "w"), ("logits",), {"transB": 1}),
    ]  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, {"w": numbers(3, 1)}, opset=13)
    check(path, torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("opset", [7, 9, 11, 13])
def test_files_of_older_operator_sets_are_read(tmp_path, opset):
    nodes = [
        ("Conv", ("x", "w1"), ("a",), {}),
        ("BatchNormalization", ("a", "s", "t", "m", "v"), ("b",), {}),
        ("Tanh", ("b",), ("c",), {}), ("Flatten", ("c",), ("d",), {}),
        ("MatMul", ("d", "w2"), ("logits",), {}),
    ]  # fmt: skip
    constants = {
        "w1": numbers(2, 1, 3, 3), "s": numbers(2), "t": numbers(2), "m": numbers(2),
        "v": numbers(2) ** 2 + 1, "w2": numbers(8, 3),
    }  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, constants, ("batch", 1, 4, 4), opset=opset)
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, variance, s, t = (torch.from_numpy(constants[name]) for name in "mvst")
    h = torch.nn.functional.conv2d(x, torch.from_numpy(constants["w1"]))
    h = torch.nn.functional.batch_norm(h, mean, variance, s, t).tanh().flatten(1)
    expected = h @ torch.from_numpy(constants["w2"])
    torch.testing.assert_close(crc.load_model(path)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RandomNormalLike", "Bernoulli"])
def test_what_is_drawn_at_random_is_no_constant(tmp_path, kind):
    nodes = [
        constant("half", 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, dtype=np.float32),
        (kind, ("half",), ("noise",), {"seed": 1.0}), ("Add", ("x", "noise"), ("a",), {}),
        ("Gemm", ("a", "w"), ("logits",), {"transB": 1}),
    ]  # fmt: skip
    path = written(tmp_path / "net.onnx", nodes, {"w": numbers(3, 6)})
    with pytest.raises(ValueError, match=f"{kind} are not read"):
        crc.load_model(path)


def test_a_dropout_that_draws_is_refused(tmp_path):
    nodes = [
        constant("half", 0.5, dtype=np.float32), constant("on", True, dtype=bool),
        ("Dropout", ("x", "half", "on"), ("a",), {}),
        ("Gemm", ("a", "w"), ("logits",), {"transB": 1}),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="draws at random"):
        crc.load_model(written(tmp_path / "net.onnx", nodes, {"w": numbers(3, 6)}))


def test_a_certificate_of_a_file(tmp_path):
    """From a file to radii, which are those of the same layers in torch."""
    w1, b1, w2 = numbers(5, 6), numbers(5), numbers(5, 3)
    nodes = [
        ("Gemm", ("x", "w1", "b1"), ("a",), {"transB": 1}),
        ("Tanh", ("a",), ("b",), {}),
        ("MatMul", ("b", "w2"), ("logits",), {}),
    ]
    path = written(tmp_path / "net.onnx", nodes, {"w1": w1, "b1": b1, "w2": w2}, (1, 6))
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    model[0].weight.data, model[0].bias.data = torch.from_numpy(w1), torch.from_numpy(b1)
    model[2].weight.data = torch.from_numpy(w2.T.copy())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    loaded = read_network(crc.load_model(path), at=x)
    for ours, theirs in zip(loaded.layers, read_network(model).layers, strict=True):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert torch.equal(loaded.logits(x.double()).argmax(1), y)


def test_what_is_not_read_is_named(tmp_path):
    gemm = ("Gemm", ("x", "w"), ("a",), {"transB": 1})
    constants = {"w": numbers(3, 6)}
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"operations ArgMax, Sin are not read.*AveragePool"):
        sin, arg = ("Sin", ("a",), ("b",), {}), ("ArgMax", ("b",), ("logits",), {})
        crc.load_model(written(path, [gemm, sin, arg], constants))
    with pytest.raises(ValueError, match="relu has corners.*holds: 1 Gemm, 1 Relu"):
        crc.load_model(written(path, [gemm, ("Relu", ("a",), ("logits",), {})], constants))
    with pytest.raises(ValueError, match="one input and one output"):
        both = [gemm, ("Add", ("a", "y"), ("logits",), {})]
        crc.load_model(written(path, both, constants, inputs=("x", "y")))
    with pytest.raises(ValueError, match="its sizes are"):
        crc.load_model(written(path, [gemm], constants, shape=("batch", "width")))
    path.write_bytes(b"no network")
    with pytest.raises(RuntimeError, match="as an ONNX file"):
        crc.load_model(path)
    with pytest.raises(RuntimeError, match="no such file"):
        crc.load_model(tmp_path / "missing.onnx")


def test_a_file_that_is_read_wrongly_is_refused(tmp_path, monkeypatch):
    """The comparison with ONNX's evaluator sees a mistake of ours."""
    from crcbook.networks import onnx_files

    nodes = [("Gemm", ("x", "w"), ("logits",), {"transB": 1, "alpha": 2.0})]
    path = written(tmp_path / "net.onnx", nodes, {"w": numbers(3, 6)})
    crc.load_model(path)
    wrong = {**onnx_files._OPERATIONS, "Gemm": lambda a, b, **_: nn.functional.linear(a, b)}
    monkeypatch.setattr(onnx_files, "_OPERATIONS", wrong)
    with pytest.raises(ValueError, match="computes something else"):
        crc.load_model(path)


def written_out(kind):
    """Operations on ``a`` that torch's exporter writes in the place of an activation."""
    if kind == "softsign":
        return [
            ("Abs", ("a",), ("size",), {}),
            ("Add", ("size", "one"), ("more",), {}),
            ("Div", ("a", "more"), ("h",), {}),
        ]
    if kind == "softplus":
        return [
            ("Softplus", ("a",), ("soft",), {}),
            ("Greater", ("a", "threshold"), ("far",), {}),
            ("Where", ("far", "a", "soft"), ("h",), {}),
        ]
    if kind == "logsigmoid":
        return [("Sigmoid", ("a",), ("s",), {}), ("Log", ("s",), ("h",), {})]
    if kind == "mish":
        return [
            ("Softplus", ("a",), ("s",), {}),
            ("Tanh", ("s",), ("t",), {}),
            ("Mul", ("a", "t"), ("h",), {}),
        ]
    if kind == "gelu":
        return [
            ("Div", ("a", "root"), ("scaled",), {}),
            ("Erf", ("scaled",), ("curve",), {}),
            ("Add", ("curve", "one"), ("more",), {}),
            ("Mul", ("a", "more"), ("twice",), {}),
            ("Mul", ("twice", "half"), ("h",), {}),
        ]
    if kind == "gelu otherwise":
        return [
            ("Mul", ("inverse root", "a"), ("scaled",), {}),
            ("Erf", ("scaled",), ("curve",), {}),
            ("Add", ("one", "curve"), ("more",), {}),
            ("Mul", ("more", "a"), ("twice",), {}),
            ("Div", ("twice", "two"), ("h",), {}),
        ]
    if kind.startswith("gelu-tanh"):
        power = kind.endswith("power")
        return [
            ("Mul", ("a", "a"), ("square",), {}),
            ("Pow", ("a", "three"), ("cube",), {}) if power else
            ("Mul", ("a", "square"), ("cube",), {}),
            ("Mul", ("cube", "cubic") if power else ("cubic", "cube"), ("little",), {}),
            ("Add", ("little", "a") if power else ("a", "little"), ("sum",), {}),
            ("Mul", ("rate", "sum"), ("scaled",), {}),
            ("Tanh", ("scaled",), ("curve",), {}),
            ("Add", ("one", "curve"), ("more",), {}),
            ("Mul", ("half", "a") if power else ("a", "more"), ("some",), {}),
            ("Mul", ("some", "more") if power else ("half", "some"), ("h",), {}),
        ]  # fmt: skip
    return [
        ("Mul", ("a", "beta"), ("scaled",), {}),
        ("Softplus", ("scaled",), ("soft",), {}),
        ("Div", ("soft", "beta"), ("curved",), {}),
        ("Greater", ("scaled", "threshold"), ("far",), {}),
        ("Where", ("far", "a", "curved"), ("h",), {}),
    ]


NUMBERS = {
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "half": np.float32(0.5),
    "root": np.float32(2**0.5),
    "inverse root": np.float32(0.5**0.5),
    "cubic": np.float32(0.044715),
    "rate": np.float32((2 / np.pi) ** 0.5),
    "beta": np.float32(2),
    "threshold": np.float32(20),
}


@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize(
    "kind",
    [
        *("softsign", "softplus", "softplus of a scale", "logsigmoid", "mish"),
        *("gelu", "gelu otherwise", "gelu-tanh", "gelu-tanh by a power"),
    ],
)
def test_activations_that_are_written_out_are_read(tmp_path, kind, batch):
    nodes = [
        ("Reshape", ("x", "shape"), ("v",), {}),
        ("Gemm", ("v", "w1", "b1"), ("a",), {}),
        *written_out(kind),
        ("Gemm", ("h", "w2"), ("logits",), {}),
    ]
    constants = {
        "shape": np.array([batch if isinstance(batch, int) else -1, 6]),
        "w1": 8 * numbers(6, 5),
        "b1": numbers(5),
        "w2": numbers(5, 3),
        **NUMBERS,
    }
    path = written(tmp_path / "net.onnx", nodes, constants, shape=(batch, 2, 3), opset=18)
    model = crc.load_model(path)
    name = read_network(model).layers[0].activation.name
    assert name == kind.partition(" ")[0]
    x = torch.from_numpy(numbers(4, 2, 3))
    if batch == "batch":
        check(path, x)
    else:
        from onnx.reference import ReferenceEvaluator

        logits = torch.cat(
            [
                torch.from_numpy(ReferenceEvaluator(str(path)).run(None, {"x": part.numpy()})[0])
                for part in x.split(batch)
            ]
        )
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": np.array([2.0, 1.0, 1.0, 1.0, 1.0], dtype=np.float32)},
        {"threshold": np.zeros(5, dtype=np.float32)},
    ],
)
def test_what_only_looks_like_an_activation_is_not_read_as_one(tmp_path, change):
    nodes = [
        ("Gemm", ("x", "w1"), ("a",), {}),
        *written_out("softplus of a scale"),
        ("Gemm", ("h", "w2"), ("logits",), {}),
    ]
    constants = {"w1": numbers(6, 5), "w2": numbers(5, 3), **NUMBERS} | change
    with pytest.raises(ValueError, match="Greater, Where are not read"):
        crc.load_model(written(tmp_path / "net.onnx", nodes, constants))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(
            ("gelu", {name: value})
            for name, value in (("one", 1.01), ("root", 1.4142), ("half", 1))
        ),
        *(("gelu otherwise", {name: 0.7}) for name in ("inverse root", "two", "one")),
        *(("gelu-tanh", {name: 0.45}) for name in ("cubic", "rate", "half", "one")),
        ("gelu-tanh by a power", {"three": 5}),
        ("gelu", {"root": np.full(5, 2**0.5, dtype=np.float32)}),
    ],
)
def test_what_only_looks_like_a_gelu_is_not_read_as_one(tmp_path, kind, change):
    nodes = [
        ("Gemm", ("x", "w1"), ("a",), {}),
        *written_out(kind),
        ("Gemm", ("h", "w2"), ("logits",), {}),
    ]
    change = {name: np.asarray(value, dtype=np.float32) for name, value in change.items()}
    constants = {"w1": numbers(6, 5), "w2": numbers(5, 3), **NUMBERS} | change
    with pytest.raises(ValueError, match="Erf are not read|Pow are not read|multiplies what"):
        crc.load_model(written(tmp_path / "net.onnx", nodes, constants))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_float32_takes_from_a_logarithm_is_no_difference(tmp_path):
    """Its sigmoid of -200 is 0, whose logarithm is no number; that of the file is -200."""
    nodes = [
        ("Gemm", ("x", "w1"), ("a",), {}),
        *written_out("logsigmoid"),
        ("Gemm", ("h", "w2"), ("logits",), {}),
    ]
    constants = {"w1": np.eye(6, dtype=np.float32), "w2": numbers(6, 3)}
    path = written(tmp_path / "net.onnx", nodes, constants)
    x = torch.full((1, 6), -200.0)
    assert not evaluated(path, x).isfinite().all()
    logits = read_network(crc.load_model(path), at=x).logits(x.double())
    torch.testing.assert_close(logits.float(), x @ torch.from_numpy(constants["w2"]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["LogSoftmax", "Softmax"])
def test_a_softmax_at_the_end_of_a_file_is_left_out(tmp_path, kind):
    """ONNX's own evaluator takes the logarithm of what underflows, far from the data."""
    nodes = [
        ("Gemm", ("x", "w1"), ("a",), {}),
        ("Softplus", ("a",), ("h",), {}),
        ("Gemm", ("h", "w2"), ("b",), {}),
        (kind, ("b",), ("answer",), {"axis": 1}),
    ]
    constants = {"w1": numbers(6, 5), "w2": numbers(5, 3)}
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    ended = crc.load_model(written(tmp_path / "ended.onnx", nodes, constants))
    logits = crc.load_model(written(tmp_path / "net.onnx", nodes[:-1], constants))
    assert torch.equal(
        read_network(ended, at=x).logits(x.double()), read_network(logits, at=x).logits(x.double())
    )
