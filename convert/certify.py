#!/usr/bin/env python3
"""Hold GGUF files against what the trained model says; exits 1 where one says something else.

python convert/certify.py reference ask-f16.gguf ask-Q8_0.gguf base.gguf+lora.gguf -o certificate
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.certify import certify, parse_thresholds
from parrot_edge.convert.reference import read_reference
from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.models import LocalModel, parse_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("reference", type=Path, help="what convert/reference.py has written")
parser.add_argument("models", nargs="+", help="MODELs: a GGUF, or base.gguf+adapter.gguf")
parser.add_argument("-o", "--output", type=Path, required=True, help="folder for certificate.json and .html")
parser.add_argument("--threshold", action="append", default=[], metavar="NAME=VALUE", help="as kl.Q4_0=0.3")
parser.add_argument("--force", action="store_true", help="replace existing files")
options = parser.parse_args()
try:
    models = [parse_model(text) for text in options.models]
    files = [model for model in models if isinstance(model, LocalModel)]
    if len(files) < len(models):
        raise UsageError("a remote model cannot be certified; name GGUF files")
    certificate = certify(
        read_reference(options.reference), files, parse_thresholds(options.threshold), say=print
    )
    certificate.write(options.output, force=options.force)
except ParrotError as error:
    sys.exit(f"Error: {error}")
sys.exit("\n".join(f"Error: {sentence}" for sentence in certificate.failed) or 0)
