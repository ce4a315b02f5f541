#!/usr/bin/env python3
"""Write the importance matrix of a 16-bit GGUF from dialogues, as llama-quantize takes it.

python convert/imatrix.py ask-f16.gguf dialogues.jsonl --role ask -o ask-imatrix.gguf
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.imatrix import compute_imatrix, draw_dialogues, write_imatrix
from parrot_edge.errors import ParrotError
from parrot_edge.recipe import DataOptions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", type=Path, help="the GGUF that will be quantised")
parser.add_argument("dialogues", nargs="+", help="JSON Lines files")
parser.add_argument("--role", choices=["ask", "chat"], required=True, help="whose words count")
parser.add_argument(
    "--held-out",
    type=float,
    default=DataOptions.held_out,
    metavar="SHARE",
    help="of the dialogues that is left out, for a certificate to measure on (default: %(default)s)",
)
parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
parser.add_argument("--force", action="store_true", help="replace an existing file")
options = parser.parse_args()
try:
    dialogues = draw_dialogues(options.dialogues, held_out=options.held_out)
    names = [Path(name).name for name in options.dialogues]
    matrix = compute_imatrix(options.model, dialogues, options.role, datasets=names)
    write_imatrix(matrix, options.output, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
