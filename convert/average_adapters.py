#!/usr/bin/env python3
"""Write the mean of several adapters, peft LoRA folders of one role and base, as one such folder.

python convert/average_adapters.py ask-1 ask-2 ask-3 -o ask
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.average import average_adapters
from parrot_edge.errors import ParrotError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "folders", type=Path, nargs="+", metavar="folder", help="what parrot train, or peft, has saved"
)
parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
parser.add_argument("--scale", type=float, default=1.0, help="how much of the mean (default: %(default)s)")
parser.add_argument("--force", action="store_true", help="replace an existing folder")
options = parser.parse_args()
try:
    kept = average_adapters(options.folders, options.output, scale=options.scale, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
print(f"{options.output} holds {kept:.1%} of the mean's sum of squares", file=sys.stderr)
