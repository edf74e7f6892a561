"""The first thing that the program does: its options, read before torch and Fabric are imported."""

import sys
import time

from launch import environments
from launch.terminals import show_what_can_be_shown
from options import command_line
from options.errors import GRACE, REFUSED, UsageError, say_error
from options.schema import Config


def parse_or_exit() -> Config:
    """The options from `sys.argv`; where they are refused, the program ends with one line and exit status 2.

    Needs neither torch nor Fabric: whoever mistypes a word need not wait for them.
    """
    show_what_can_be_shown()
    try:
        config = command_line.parse()
        if config.launcher == "env":
            environments.take_as_given()
        if problem := environments.missing_launcher(config.devices):
            raise UsageError(problem)
        environments.forget_left_overs(config.num_nodes)
        return config
    except UsageError as error:
        if environments.rank() == 0:
            say_error(str(error))
        else:
            time.sleep(GRACE)  # launchers end all processes when the first one ends: let rank 0 speak before
        sys.exit(REFUSED)
