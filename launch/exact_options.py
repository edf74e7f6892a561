"""Make the launchers take options by their exact names only; run once by `make install`, in the virtual environment.

`fabric run main.py --nu=1` and `torchrun main.py --nu=1` hand the script's options through torchrun's parser. Before
Python 3.12.8 that parser takes `--nu` for an abbreviation of its own `--numa-binding` and gives up. This writes a file
into the environment's site-packages that turns abbreviations off in those two commands, and nowhere else.
"""

import sysconfig
from pathlib import Path

MODULE = '''\
"""Written by AdAdaGrad's launch/exact_options.py: no abbreviated options in `fabric` and `torchrun`."""
import os
import sys

if len(sys.orig_argv) > 1 and os.path.basename(sys.orig_argv[1]) in ("fabric", "torchrun"):
    import argparse

    argparse.ArgumentParser._get_option_tuples = lambda parser, option_string: []
'''

if __name__ == "__main__":
    site_packages = Path(sysconfig.get_paths()["purelib"])
    (site_packages / "adadagrad_exact_options.py").write_text(MODULE)
    (site_packages / "adadagrad_exact_options.pth").write_text("import adadagrad_exact_options\n")
