"""What optimum's command line finds in this namespace (no package: PEP 420)."""

from optimum.commands.export.base import ExportCommand

from dsvl_export.optimum_command import DeepSeekVLExportCommand

REGISTER_COMMANDS = [(DeepSeekVLExportCommand, ExportCommand)]
