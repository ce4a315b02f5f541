#!/usr/bin/env python3
"""Write a 16-bit GGUF in fewer bits, and print what became of its matrices.

python convert/quantize.py ask-f16.gguf Q4_K_M -o ask-Q4_K_M.gguf --imatrix ask-imatrix.gguf
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.quantize import quantize
from parrot_edge.errors import ParrotError

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source", type=Path, help="a GGUF in 16 or 32 bits")
parser.add_argument("type", help="as llama-quantize names it: Q8_0, Q4_K_M, IQ4_NL, ...")
parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
parser.add_argument(
    "--imatrix", type=Path, help="importance matrix, from convert/imatrix.py or llama-imatrix"
)
parser.add_argument("--force", action="store_true", help="replace an existing file")
options = parser.parse_args()
try:
    done = quantize(
        options.source, options.output, options.type, imatrix=options.imatrix, force=options.force
    )
    print(json.dumps(done.as_dict()))
    if done.note:
        print(done.note, file=sys.stderr)
except ParrotError as error:
    sys.exit(f"Error: {error}")
