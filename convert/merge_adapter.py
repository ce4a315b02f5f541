#!/usr/bin/env python3
"""Merge a GGUF adapter into the GGUF it was trained on, as one float16 model.

python convert/merge_adapter.py smollm2+ask.gguf -o ask-merged.gguf
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.merge import merge_adapter
from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.models import LocalModel, parse_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="MODEL with an adapter: base.gguf+adapter.gguf, smollm2+adapter.gguf")
parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
parser.add_argument("--scale", type=float, default=1.0, help="how much of the adapter (default: %(default)s)")
parser.add_argument("--force", action="store_true", help="replace an existing file")
options = parser.parse_args()
try:
    model = parse_model(options.model)
    if not isinstance(model, LocalModel) or not model.adapter:
        raise UsageError(f"{options.model} has no adapter to merge; name it as base.gguf+adapter.gguf")
    merge_adapter(model.path, model.adapter, options.output, scale=options.scale, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
