"""Engine sessions call by call: order of steps, memory, graphs, aliases, and what is said when a call fails."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtimes.backends.engines import backend
from runtimes.backends.engines.cache import DeviceCache
from runtimes.backends.engines.cuda import Cuda, CudaError
from runtimes.backends.engines.layout import aliases, align, tensor_bytes
from runtimes.backends.engines.session import EngineComponent, EngineDecoder
from runtimes.bundle.bundle import Bundle
from runtimes.bundle.contracts import Contract, TensorSpec
from runtimes.cache import CapacityError
from runtimes.errors import UserError
from runtimes.session import SessionOptions
from tests.runtimes.backends.fake_cuda import (
    OUT_OF_MEMORY,
    FakeCuda,
    FakeEngine,
    loaded,
)
from tests.runtimes.backends.test_session_contract import close, embeds

CAPACITY = 48


@pytest.fixture(params=["trt11", "trt10"])
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(dialect: str, request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"{dialect}_bundle")


def onnx_file(bundle: Bundle, component: str = "decoder", precision: str = "fp32") -> tuple[Path, Contract]:
    file = bundle.path(bundle.artifact(component, "tensorrt", precision).files[0])
    return file, bundle.manifest.contracts[precision][component]


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def decoder(bundle: Bundle, cuda: FakeCuda) -> EngineDecoder:
    file, contract = onnx_file(bundle)
    return EngineDecoder(loaded(file, contract, CAPACITY, cuda=cuda), contract)


def engine_of(decoder: EngineDecoder) -> FakeEngine:
    return decoder._loaded.engine


def since(cuda: FakeCuda, work: Callable[[], object]) -> list[str]:
    """Names of the calls that ``work`` makes."""
    before = len(cuda.calls)
    work()
    return cuda.names()[before:]


def test_a_prefill_is_copies_a_run_and_copies_back(
    decoder: EngineDecoder, cuda: FakeCuda, dialect: str
) -> None:
    cache = decoder.new_cache(1, CAPACITY)
    names = since(cuda, lambda: decoder.decode(embeds(decoder, 1, 7), np.array([6]), cache))
    states = len(decoder.contract.states)
    rows = ["cudaMemcpy2DAsync"] * (states if dialect == "trt10" else 0)
    assert names == ["cudaMemcpyAsync"] * 3 + ["cudaMemcpyAsync", *rows, "cudaStreamSynchronize"]
    prefill, decode = engine_of(decoder).contexts
    assert (prefill.profile, prefill.runs) == (0, 1)
    assert (decode.profile, decode.runs) == (1, 0)


def test_memory_is_allocated_once(decoder: EngineDecoder, cuda: FakeCuda) -> None:
    cache = decoder.new_cache(1, CAPACITY)
    allocated = (len(cuda.device), len(cuda.host))
    for step in range(10):
        decoder.decode(embeds(decoder, 1, 2 if step % 3 else 1, seed=step), np.array([0]), cache)
    assert (len(cuda.device), len(cuda.host)) == allocated
    assert cuda.names().count("cudaMalloc") == len(cuda.device)


def test_memory_is_given_back(bundle: Bundle, cuda: FakeCuda) -> None:
    file, contract = onnx_file(bundle)
    decoder = EngineDecoder(loaded(file, contract, CAPACITY, cuda=cuda), contract)
    cache = decoder.new_cache(2, CAPACITY)
    assert cuda.device and cuda.host
    for step in range(3):
        decoder.decode(embeds(decoder, 2, 1, seed=step), np.array([0]), cache)
    assert cuda.streams == 1 and cuda.graphs
    del decoder
    gc.collect()
    assert cache.arrays and cuda.streams == 1  # a cache that outlives its session can still be read
    del cache
    gc.collect()
    assert not cuda.device and not cuda.host and not cuda.streams and not cuda.graphs


def test_decode_becomes_a_graph_at_the_second_step(
    decoder: EngineDecoder, cuda: FakeCuda, dialect: str
) -> None:
    cache, context = decoder.new_cache(1, CAPACITY), engine_of(decoder).contexts[1]
    outputs, steps = [], []
    for step in range(4):
        x = embeds(decoder, 1, 1, seed=step)
        steps.append(since(cuda, lambda x=x: outputs.append(decoder.decode(x, np.array([0]), cache))))
    rows = ["cudaMemcpy2DAsync"] * (len(decoder.contract.states) if dialect == "trt10" else 0)
    end = [*rows, "cudaStreamSynchronize"]
    capture = [
        "cudaStreamBeginCapture",
        *["cudaMemcpyAsync"] * 4,
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
    ]
    assert steps[0] == [*["cudaMemcpyAsync"] * 4, *end]
    assert steps[1] == [*capture, "cudaGraphLaunch", *end]
    assert steps[2] == steps[3] == ["cudaGraphLaunch", *end]
    assert context.runs == 2  # the plain one and the captured one
    plain = decoder.new_cache(1, CAPACITY)
    x = np.concatenate([embeds(decoder, 1, 1, seed=step) for step in range(4)], axis=1)
    assert close(decoder, np.concatenate(outputs, axis=1), decoder.decode(x, np.arange(4), plain))


def test_a_graph_is_one_cache_and_batch(decoder: EngineDecoder, cuda: FakeCuda) -> None:
    first, second = decoder.new_cache(1, CAPACITY), decoder.new_cache(1, CAPACITY)
    x = embeds(decoder, 1, 1)
    for _ in range(2):
        decoder.decode(x, np.array([0]), first)
    names = since(cuda, lambda: decoder.decode(x, np.array([0]), second))
    assert "cudaGraphExecDestroy" in names and "cudaGraphLaunch" not in names
    batch = decoder.new_cache(3, CAPACITY)
    assert "cudaGraphLaunch" not in since(
        cuda, lambda: decoder.decode(embeds(decoder, 3, 1), np.array([0]), batch)
    )
    assert "cudaGraphLaunch" in since(
        cuda, lambda: decoder.decode(embeds(decoder, 3, 1), np.array([0]), batch)
    )


def test_states_share_memory_with_their_updates(trt11_bundle: Bundle) -> None:
    """The fake engine itself insists on it at every run, as KVCacheUpdate does; here the plan of it."""
    file, contract = onnx_file(trt11_bundle)
    decoder = EngineDecoder(loaded(file, contract, CAPACITY), contract)
    cache = decoder.new_cache(1, 20)
    decoder.decode(embeds(decoder, 1, 3), np.array([2]), cache)
    addresses = engine_of(decoder).contexts[0].addresses
    for index, spec in enumerate(contract.states):
        assert addresses[spec.name] == addresses[f"{spec.name}_updated"] == cache.addresses[index]
    assert (cache.capacity, cache.slots) == (
        20,
        CAPACITY,
    )  # the engine's length is fixed, the use of it is not


def test_an_engine_with_a_dynamic_cache_takes_what_is_asked(trt10_bundle: Bundle) -> None:
    file, contract = onnx_file(trt10_bundle)
    decoder = EngineDecoder(loaded(file, contract, CAPACITY), contract)
    assert decoder.new_cache(1, 20).slots == 20


def test_rows_beyond_the_profile_come_in_pieces(decoder: EngineDecoder, bundle: Bundle) -> None:
    """The engine gives at most 64 rows of logits at once, and 100 were asked for, two of them twice."""
    file, contract = onnx_file(bundle)
    large = EngineDecoder(loaded(file, contract, 128), contract)
    x = embeds(large, 1, 100)
    rows = np.array([99, 3, 3, *range(100)])
    found = large.decode(x, rows, large.new_cache(1, 128))
    assert engine_of(large).contexts[0].runs == 2
    each = large.decode(x, np.array([99]), large.new_cache(1, 128))
    assert close(large, found[:, :1], each)
    assert np.array_equal(found[:, 1], found[:, 2]) and np.array_equal(found[:, 1], found[:, 6])


def test_a_prompt_beyond_the_engine_is_refused_before_anything_runs(
    decoder: EngineDecoder, cuda: FakeCuda
) -> None:
    cache = decoder.new_cache(1, CAPACITY)
    calls = len(cuda.calls)
    with pytest.raises(CapacityError, match=f"needs 49 positions but the KV cache holds {CAPACITY}"):
        decoder.decode(embeds(decoder, 1, 49), np.array([48]), cache)
    assert len(cuda.calls) == calls
    with pytest.raises(
        CapacityError, match=r"holds 48 tokens, but a KV cache of 49 was requested; use at most 48"
    ):
        decoder.new_cache(1, 49)
    with pytest.raises(UserError, match="decodes at most 4 sequences together, not 5"):
        decoder.new_cache(5, CAPACITY)


def test_out_of_device_memory(bundle: Bundle) -> None:
    file, contract = onnx_file(bundle)
    decoder = EngineDecoder(loaded(file, contract, CAPACITY, cuda=FakeCuda(memory_bytes=4_000_000)), contract)
    with pytest.raises(
        CudaError,
        match=r"has no \d+ MB left for a KV cache of 48 tokens \(cudaErrorMemoryAllocation\); use a smaller",
    ):
        _ = [decoder.new_cache(4, CAPACITY) for _ in range(1000)]


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_failing_call_has_cudas_name_and_takes_nothing_from_the_cache(
    decoder: EngineDecoder, cuda: FakeCuda, call: str
) -> None:
    cache, x = decoder.new_cache(1, CAPACITY), embeds(decoder, 1, 1)
    decoder.decode(x, np.array([0]), cache)
    cuda.fail[call] = 1
    with pytest.raises(CudaError, match=f"CUDA failed in {call}.*: cudaErrorInvalidValue"):
        decoder.decode(x, np.array([0]), cache)
    assert cache.length == 1
    cuda.fail.clear()
    expected = decoder.decode(embeds(decoder, 1, 1), np.array([0]), cache)
    assert np.isfinite(expected).all() and cache.length == 2


def test_a_step_that_cannot_be_captured_runs_without_a_graph(decoder: EngineDecoder, cuda: FakeCuda) -> None:
    cache, x = decoder.new_cache(1, CAPACITY), embeds(decoder, 1, 1)
    decoder.decode(x, np.array([0]), cache)
    context = engine_of(decoder).contexts[1]
    context.refuses_capture = True
    steps = [decoder.decode(embeds(decoder, 1, 1, seed=step), np.array([0]), cache) for step in range(3)]
    assert (
        cuda.capturing is None
        and decoder.no_graph_reason == "TensorRT failed in the decoder: it gives no reason."
    )
    assert cuda.names().count("cudaStreamBeginCapture") == 1 and "cudaGraphLaunch" not in cuda.names()
    other = decoder.new_cache(1, CAPACITY)
    whole = np.concatenate([x, *(embeds(decoder, 1, 1, seed=step) for step in range(3))], axis=1)
    assert close(decoder, np.concatenate(steps, axis=1), decoder.decode(whole, np.arange(1, 4), other))


def test_an_engine_that_fails_says_so(decoder: EngineDecoder, cuda: FakeCuda) -> None:
    cache, x = decoder.new_cache(1, CAPACITY), embeds(decoder, 1, 3)
    context = engine_of(decoder).contexts[0]
    context.fails = True
    with pytest.raises(UserError, match="TensorRT failed in the decoder: it gives no reason"):
        decoder.decode(x, np.array([0]), cache)
    assert cache.length == 0
    context.fails = False
    decoder.decode(x, np.array([0]), cache)
    assert cache.length == 3


def test_out_of_memory_outside_of_an_allocation_is_a_sentence(cuda: FakeCuda) -> None:
    for name, arguments in (("cudaStreamCreate", ()), ("cudaGraphInstantiate", (object(), 0))):
        cuda.fail[name] = OUT_OF_MEMORY
        with pytest.raises(
            CudaError, match=r"The GPU has no memory left \(cudaErrorMemoryAllocation\); use a smaller"
        ):
            Cuda(cuda).call(name, *arguments)


def test_a_row_of_a_batch_is_no_cache_of_one(bundle: Bundle, cuda: FakeCuda) -> None:
    """Though its first state may lie where that of a cache of one row did: all addresses make the key."""
    _, contract = onnx_file(bundle)

    def cache(rows: int) -> DeviceCache:
        state = align(tensor_bytes(contract.states[0], {"batch": rows, "capacity": CAPACITY}))
        block = SimpleNamespace(
            address=4096, offsets=[index * state for index in range(len(contract.states))]
        )
        return DeviceCache(contract.states, 1, CAPACITY, CAPACITY, Cuda(cuda), 7, block)  # type: ignore[arg-type]

    row, alone = cache(rows=2), cache(rows=1)
    assert row.addresses[0] == alone.addresses[0]
    assert row.key != alone.key


def test_components_run_image_by_image(bundle: Bundle, cuda: FakeCuda) -> None:
    file, contract = onnx_file(bundle, "adaptor")
    component = EngineComponent(loaded(file, contract, CAPACITY, cuda=cuda), contract)
    random = np.random.default_rng(0)
    shapes = {spec.name: [3, *map(int, spec.shape[1:])] for spec in contract.inputs}
    inputs = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    found = component.run(inputs)["image_embeds"]
    plain = backend.open_component("tensorrt", file, contract, SessionOptions(device="cpu"))
    assert np.allclose(found, plain.run(inputs)["image_embeds"], atol=1e-5)
    assert component._runner.contexts[0].runs == 3
    with pytest.raises(ValueError, match="must be float32"):
        component.run({name: array.astype(np.float64) for name, array in inputs.items()})


def test_an_engine_of_another_contract_is_refused(bundle: Bundle) -> None:
    file, contract = onnx_file(bundle)
    other = replace(contract, inputs=(replace(contract.inputs[0], dtype="float16"), *contract.inputs[1:]))
    with pytest.raises(
        UserError, match="inputs_embeds is float32 in the engine .* and float16 in its contract"
    ):
        EngineDecoder(loaded(file, other, CAPACITY), other)
    more = replace(contract, outputs=(*contract.outputs, TensorSpec("tap", "float32", (1,), "")))
    with pytest.raises(UserError, match="has no tensor tap; build it again"):
        EngineDecoder(loaded(file, more, CAPACITY), more)
    with pytest.raises(UserError, match="does not return the state key_cache_0"):
        aliases(contract, {"logits": None})
    with pytest.raises(UserError, match="shares the memory of value_cache_0"):
        aliases(contract, {"key_cache_0_updated": "value_cache_0"})


def test_the_real_cuda_python_has_every_function_of_the_fake() -> None:
    """So that a name that NVIDIA never had cannot pass here."""
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-python is there for Linux on x86-64 alone"
    )
    names = [name for name in dir(FakeCuda) if name.startswith("cuda")]
    assert len(names) > 15
    for name in names:
        assert hasattr(runtime, name), name
    assert {item.name for item in runtime.cudaMemcpyKind} >= vars(FakeCuda.cudaMemcpyKind).keys()
    assert {item.name for item in runtime.cudaStreamCaptureMode} >= vars(
        FakeCuda.cudaStreamCaptureMode
    ).keys()


def test_the_real_tensorrt_has_every_method_of_the_fake() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is there for Linux on x86-64 alone")
    from tests.runtimes.backends.fake_cuda import FakeContext

    for fake, real in ((FakeEngine, trt.ICudaEngine), (FakeContext, trt.IExecutionContext)):
        for name in vars(fake):
            if not name.startswith("_") and callable(getattr(fake, name)):
                assert hasattr(real, name), name
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.ICudaEngine, "streamable_weights_size")
