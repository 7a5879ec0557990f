"""``optimum-cli export dsvl``: our ``export`` in the command line of Hugging Face's optimum.

optimum loads every module of the namespace ``optimum.commands.register`` (PEP 420): no folder above this file
may hold an ``__init__.py``.
"""

from __future__ import annotations

from argparse import ArgumentParser

import typer
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from typer.core import TyperGroup, TyperOption

from dsvl_export.cli import app, main


class DeepSeekVLExportCommand(BaseOptimumCLICommand):
    """Takes every option of ``dsvl-export export``; the checkpoint is ``--model``, as optimum names it."""

    COMMAND = CommandInfo(
        "dsvl",
        "Export DeepSeek-VL and Janus to ONNX Runtime, OpenVINO, TensorRT, Core ML, Core AI, ExecuTorch.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        group = typer.main.get_command(app)
        assert isinstance(group, TyperGroup)
        parser.add_argument(
            "-m", "--model", required=True, help="'tiny' (bundled), a checkpoint folder, or a hub id."
        )
        for option in group.commands["export"].params:
            if isinstance(option, TyperOption):
                _add(parser, option)

    def run(self) -> None:
        assert self.args is not None
        main(["export", self.args.model, *(word for words in self.args.given for word in words)])


def _add(parser: ArgumentParser, option: TyperOption) -> None:
    """An option whose words are kept in ``given`` as they were written; our own command reads them."""
    shown = (option.help or "").replace("%", "%%")
    if option.is_flag:
        texts = [shown] * len(option.opts) + [f"The opposite of {option.opts[0]}."] * len(
            option.secondary_opts
        )
        for name, text in zip((*option.opts, *option.secondary_opts), texts, strict=True):
            parser.add_argument(
                name, dest="given", action="append_const", const=(name,), default=[], help=text
            )
        return
    parser.add_argument(
        *option.opts,
        dest="given",
        action="append",
        type=lambda value: (option.opts[0], value),
        default=[],
        required=option.required,
        metavar=option.metavar or (option.name or "").upper(),
        help=shown,
    )


REGISTER_COMMANDS = [(DeepSeekVLExportCommand, ExportCommand)]
