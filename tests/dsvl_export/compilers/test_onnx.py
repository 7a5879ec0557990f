"""Trace and lowering: contracts, exactness on random models, streaming, external data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dsvl_export.compilers.onnx.check import check_contract
from dsvl_export.compilers.onnx.dialect_ort import OrtDialect
from dsvl_export.compilers.onnx.lower import lower
from dsvl_export.compilers.onnx.writer import write_model
from dsvl_export.compilers.onnxruntime import compile_component
from dsvl_export.targets.options import CompileOptions
from reference.trace import TRACED_COMPONENTS, component_contract, trace_component
from runtimes.bundle.contracts import Contract
from runtimes.errors import UserError
from tests.conftest import OraclePair


def loader(pair: OraclePair, component: str):
    return lambda name: pair.checkpoint.load(f"{component}.{name}")


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    reference = expected.numpy()
    assert found.shape == reference.shape
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 7e-3)])
def test_vision_and_adaptor_on_random_models(
    pair: OraclePair, tmp_path: Path, precision: str, limit: float
) -> None:
    """Two images at once; adaptor fed by the file's own features."""
    side = pair.model.config.vision.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    feeds = {"pixel_values": pixels.numpy()}
    expected = {
        "vision_encoder": pair.model.vision_encoder(pixels),
        "adaptor": (pair.model.encode_image(pixels),),
    }
    for component, outputs in expected.items():
        traced = trace_component(pair.checkpoint.config, component, precision)
        compiled = compile_component(
            traced, loader(pair, component), tmp_path, lambda count: None, CompileOptions()
        )
        session = onnxruntime.InferenceSession(str(compiled.files[0]))
        dtype = traced.contract.inputs[0].dtype
        found = session.run(None, {name: array.astype(dtype) for name, array in feeds.items()})
        for array, tensor in zip(found, outputs, strict=True):
            assert relative(array.astype(np.float32), tensor) < limit
        feeds = {spec.name: array for spec, array in zip(traced.contract.outputs, found, strict=True)}


@pytest.mark.parametrize("component", TRACED_COMPONENTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_programs_follow_their_contracts(pair: OraclePair, component: str, precision: str) -> None:
    """Same names' count, dtypes and symbolic shapes; no weight has memory while tracing."""
    traced = trace_component(pair.checkpoint.config, component, precision)
    program, contract = traced.program, traced.contract
    assert contract == component_contract(pair.checkpoint.config, component, precision)
    assert Contract.from_dict(asdict(contract)) == contract
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    values = [placeholders[name] for name in program.graph_signature.user_inputs]
    specs = contract.inputs + contract.states
    assert len(values) == len(specs)
    symbols: dict[str, str] = {}
    for spec, value in zip(specs, values, strict=True):
        assert str(value.dtype).removeprefix("torch.") == spec.dtype
        for dim, found in zip(spec.shape, value.shape, strict=True):
            if isinstance(dim, int):
                assert found == dim
            else:
                assert symbols.setdefault(dim, str(found)) == str(found)
                assert not isinstance(found, int)
    assert len(set(symbols.values())) == len(symbols)
    assert all(type(tensor).__name__ == "FakeTensor" for tensor in program.state_dict.values())


def test_the_decoder_keeps_its_attention_whole(pair: OraclePair) -> None:
    program = trace_component(pair.checkpoint.config, "decoder", "fp32").program
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("dsvl.cached_attention.default") == 3
    assert not any("scatter" in target or "softmax" in target for target in targets)


def test_the_towers_keep_their_attention_whole(pair: OraclePair) -> None:
    """Nothing is left of the axes that the program exchanges for it: what a node gives is read."""
    traced = trace_component(pair.checkpoint.config, "vision_encoder", "fp32")
    graph = lower(traced, loader(pair, "vision_encoder"), OrtDialect())
    nodes, vision = graph.model().graph.node, pair.checkpoint.config.vision
    operators = Counter(node.op_type for node in nodes)
    layers = vision.siglip.layers + (vision.sam.layers if vision.sam else 0)
    assert operators["MultiHeadAttention"] == layers
    assert "Softmax" not in operators
    read = {name for node in nodes for name in node.input} | set(graph.taps.values())
    read |= {value.name for value in graph.outputs}
    assert all(read.intersection(node.output) for node in nodes)
    assert graph.initializers.keys() <= read


def test_attention_in_blocks_of_queries_changes_no_bit(
    hybrid_pair: OraclePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more than one image, and where the most that is allowed is less than one row's scores."""
    side = hybrid_pair.model.config.vision.image_size
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).numpy()
    traced = trace_component(hybrid_pair.checkpoint.config, "vision_encoder", "fp32")
    found, attentions = {}, {}
    for most in (1 << 25, 1 << 9, 1):
        monkeypatch.setattr("dsvl_export.compilers.onnx.dialect_ort.MAX_BLOCK_SCORES", most)
        graph = lower(traced, loader(hybrid_pair, "vision_encoder"), OrtDialect())
        (file,) = write_model(graph, tmp_path / f"{most}.onnx", lambda count: None)
        attentions[most] = Counter(node.op_type for node in graph.nodes)["MultiHeadAttention"]
        found[most] = onnxruntime.InferenceSession(str(file)).run(None, {"pixel_values": pixels})
    whole, some, rows = attentions.values()
    assert whole < some < rows
    for most in (1 << 9, 1):
        for array, expected in zip(found[most], found[1 << 25], strict=True):
            np.testing.assert_array_equal(array, expected)


def test_weights_load_one_at_a_time(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    """With external data no weight is loaded before the one before it is written."""
    events: list[str] = []

    def load(name: str) -> torch.Tensor:
        events.append(name)
        return hybrid_pair.checkpoint.load(f"decoder.{name}")

    graph = lower(trace_component(hybrid_pair.checkpoint.config, "decoder", "fp32"), load, OrtDialect())
    assert events == []
    files = write_model(graph, tmp_path / "d.onnx", lambda count: events.append("written"), external_above=0)
    assert [file.name for file in files] == ["d.onnx", "d.onnx.data"]
    loads = [index for index, event in enumerate(events) if event != "written"]
    assert len(loads) > 20
    assert all(events[index + 1] == "written" for index in loads)
    onnx.checker.check_model(str(files[0]), full_check=True)


def test_external_data_gives_the_same_numbers(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    traced = trace_component(hybrid_pair.checkpoint.config, "adaptor", "fp32")
    outputs = []
    for name, above in (("inline", 1 << 30), ("external", 0)):
        graph = lower(traced, loader(hybrid_pair, "adaptor"), OrtDialect())
        write_model(graph, tmp_path / f"{name}.onnx", lambda count: None, external_above=above)
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"))
        feeds = {item.name: np.ones((1, *item.shape[1:]), np.float32) for item in session.get_inputs()}
        outputs.append(session.run(None, feeds)[0])
    assert np.array_equal(*outputs)
    assert (tmp_path / "external.onnx").stat().st_size < 4000


def test_what_breaks_a_contract_is_refused(hybrid_pair: OraclePair, tmp_path: Path) -> None:
    traced = trace_component(hybrid_pair.checkpoint.config, "adaptor", "fp32")
    graph = lower(traced, loader(hybrid_pair, "adaptor"), OrtDialect())
    write_model(graph, tmp_path / "a.onnx", lambda count: None)
    model = onnx.load(str(tmp_path / "a.onnx"))
    check_contract(model, traced.contract)
    model.graph.input[0].name = "renamed"
    with pytest.raises(ValueError, match="inputs of adaptor break its contract"):
        check_contract(model, traced.contract)
    model = onnx.load(str(tmp_path / "a.onnx"))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(ValueError, match="outputs of adaptor break its contract"):
        check_contract(model, traced.contract)
    model = onnx.load(str(tmp_path / "a.onnx"))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "low_features" if name == "high_features" else name
    with pytest.raises(ValueError, match="never uses its inputs high_features"):
        check_contract(model, traced.contract)


def test_operators_without_a_lowering_are_named() -> None:
    class Odd(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.cumsum(pixel_values, 1),)

    from reference.trace import TracedComponent
    from runtimes.bundle.contracts import TensorSpec

    spec = TensorSpec("pixel_values", "float32", (2, 3), "")
    program = torch.export.export(Odd(), (torch.zeros(2, 3),))
    contract = Contract("vision_encoder", (spec,), (TensorSpec("out", "float32", (2, 3), ""),))
    with pytest.raises(NotImplementedError, match=r"no ONNX lowering for aten\.cumsum"):
        lower(TracedComponent(program, contract), lambda name: torch.zeros(0), OrtDialect())


def test_head_sizes_that_onnx_runtime_cannot_take(pair: OraclePair) -> None:
    from dataclasses import replace

    config = replace(pair.checkpoint.config, decoder=replace(pair.checkpoint.config.decoder, head_dim=12))
    with pytest.raises(UserError, match="multiple of 16, this decoder has 12"):
        lower(trace_component(config, "decoder", "fp32"), lambda name: torch.zeros(0), OrtDialect())


@pytest.mark.parametrize("component", TRACED_COMPONENTS)
def test_every_component_loads_with_its_weights_outside(
    pair: OraclePair, tmp_path: Path, component: str
) -> None:
    """Above 1 GiB weights go into a file of their own; shapes must not, or nothing can be inferred."""
    traced = trace_component(pair.checkpoint.config, component, "fp32")
    graph = lower(traced, loader(pair, component), OrtDialect())
    file, data = write_model(graph, tmp_path / "m.onnx", lambda count: None, external_above=0)
    assert data.stat().st_size > file.stat().st_size / 4
    onnx.checker.check_model(str(file), full_check=True)
    onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
