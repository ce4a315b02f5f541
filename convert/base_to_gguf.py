#!/usr/bin/env python3
"""Write the base of an adapter as a 16-bit GGUF; with --from-4-bits, as QLoRA held it while training.

python convert/base_to_gguf.py ask-8b -o ask-8b-base.gguf --from-4-bits
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.base import write_base
from parrot_edge.convert.trained import find_trained
from parrot_edge.errors import ParrotError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="what parrot train, or peft, has saved")
parser.add_argument("--base", help="where its base lies, where the folder does not tell")
parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
parser.add_argument("--from-4-bits", action="store_true", help="dequantise what 4 bits made of it")
parser.add_argument("--force", action="store_true", help="replace an existing file")
options = parser.parse_args()
try:
    trained = find_trained(options.folder, options.base)
    write_base(trained, options.output, dequantized=options.from_4_bits, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
