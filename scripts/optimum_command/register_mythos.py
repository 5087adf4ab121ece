"""``optimum-cli export mythos``: the same bundle as ``mythos-edge export``, where people of optimum look for it.

Installed as ``optimum.commands.register.register_mythos``, where optimum-cli finds commands of others. It is read at
every start of optimum-cli, so what takes time to import is imported by the verb.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from mythos_edge.scripts import arguments, cli, export_verb, interrupts
from mythos_edge.scripts.console import Console


class MythosExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum publishes no types
    """The verb ``export`` with its places named as optimum names them."""

    COMMAND = CommandInfo(name="mythos", help="Export OpenMythos checkpoints to a bundle of mythos-edge.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declares the options, those of ``mythos-edge export`` among them."""
        model = ".pt, .pth, .bin, .safetensors, or a folder with safetensors"
        parser.add_argument(
            "--model", "-m", type=arguments.path, required=True, dest="checkpoint", metavar="CKPT", help=model
        )
        parser.add_argument("output", type=arguments.path, metavar="OUT", help="folder to write")
        export_verb.add_options(parser)
        cli.add_common(parser)
        parser.set_defaults(run=export_verb.run)

    def run(self) -> None:
        """Exports, and ends optimum-cli with the exit code of ``mythos-edge export``."""
        interrupts.install()
        sys.exit(cli.run(lambda: self.args, Console(self.args.json), self.args.debug))


REGISTER_COMMANDS = [(MythosExportCommand, ExportCommand)]
