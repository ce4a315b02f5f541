#!/usr/bin/env python3
"""Write down what a trained adapter says over its base: what convert/certify.py holds files against.

python convert/reference.py ask-8b --data dialogues.jsonl -o reference
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.listen import write_reference
from parrot_edge.convert.trained import load_trained
from parrot_edge.errors import ParrotError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="what parrot train, or peft, has saved")
parser.add_argument("--base", help="where its base lies, where the folder does not tell")
parser.add_argument("--data", nargs="*", default=[], metavar="FILE", help="dialogues to measure on")
parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
parser.add_argument("--force", action="store_true", help="replace an existing folder")
options = parser.parse_args()
try:
    trained = load_trained(options.folder, options.base)
    write_reference(trained, options.output, options.data, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
