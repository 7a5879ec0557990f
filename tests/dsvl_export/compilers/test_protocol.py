"""Capabilities of compilers: which ones the built-in compilers have, and what a third party's may leave out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dsvl_export.compilers.protocol import (
    App,
    BuildsGraphs,
    ChecksPlans,
    Compiled,
    Compiler,
    CompilesComponents,
    CompilesProgram,
    DeclaresOptions,
    NeedsScratch,
    RunsLayers,
    WritesListing,
    compile_parts,
)
from dsvl_export.compilers.registry import BUILT_IN, check_options, load_compiler
from dsvl_export.targets.options import CompileOptions, ExecuTorchOptions, TensorRTOptions
from runtimes.errors import UserError

ONNX = {CompilesComponents, DeclaresOptions, BuildsGraphs, RunsLayers}
CAPABILITIES: dict[str, set[Any]] = {
    "coreai": {CompilesComponents, DeclaresOptions},
    "coreml": {CompilesComponents, DeclaresOptions, RunsLayers, WritesListing},
    "executorch": {CompilesProgram, DeclaresOptions, ChecksPlans},
    "onnxruntime": {*ONNX, ChecksPlans},
    "openvino": {CompilesComponents, DeclaresOptions, NeedsScratch, RunsLayers},
    "tensorrt": ONNX,
    "tensorrt_rtx": ONNX,
}
ALL = set().union(*CAPABILITIES.values())
COMPILED = Compiled((Path("x"),), "a device", "a dialect", {})


def third_party(**members: Any) -> Compiler:
    """An object as an entry point may name, with nothing but these members."""
    return cast(Compiler, SimpleNamespace(**members))


@pytest.mark.parametrize("backend", BUILT_IN)
def test_capabilities_of_the_built_in_compilers(backend: str) -> None:
    try:
        compiler = load_compiler(backend)
    except UserError as error:
        pytest.skip(str(error))
    assert {protocol for protocol in ALL if isinstance(compiler, protocol)} == CAPABILITIES[backend]


def test_a_member_that_is_none_is_no_capability() -> None:
    assert not isinstance(third_party(run_layers=None), RunsLayers)


def test_a_compiler_without_options_takes_all_options() -> None:
    options = CompileOptions(executorch=ExecuTorchOptions("mine"), tensorrt=TensorRTOptions("10.3"))
    check_options({"mine": third_party()}, options)
    check_options({"mine": third_party(OPTIONS=("executorch.delegate", "tensorrt.version"))}, options)
    with pytest.raises(UserError, match="mine has no --delegate"):
        check_options({"mine": third_party(OPTIONS=("tensorrt.version",))}, options)


def test_compile_parts_calls_what_the_compiler_has(tmp_path: Path) -> None:
    app, options = cast(App, object()), CompileOptions()
    traced, calls = cast(Any, object()), []

    def load(name: str) -> None: ...

    def on_bytes(count: int) -> None: ...

    def compile_component(*arguments: Any) -> Compiled:
        calls.append(arguments)
        return COMPILED

    def compile_program(*arguments: Any) -> Compiled:
        calls.append(arguments)
        return COMPILED

    one, two = {"adaptor": (traced, load)}, {"adaptor": (traced, load), "decoder": (traced, load)}
    rest = (tmp_path, on_bytes, options)
    assert compile_parts(third_party(compile_component=compile_component), app, one, *rest) is COMPILED
    assert compile_parts(third_party(compile_program=compile_program), app, two, *rest) is COMPILED
    assert calls == [(traced, load, *rest), (app, two, *rest)]
    with pytest.raises(TypeError, match="neither compile_component nor compile_program"):
        compile_parts(third_party(), app, one, *rest)
