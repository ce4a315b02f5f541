#!/usr/bin/env python3
"""Write a peft LoRA folder as a GGUF adapter.

python convert/adapter_to_gguf.py ask smollm2 -o ask.gguf --license apache-2.0
python convert/adapter_to_gguf.py ask-8b ask-8b-base.gguf -o ask.gguf --trained-on ./Qwen2.5-7B
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from parrot_edge.convert.adapter import write_adapter
from parrot_edge.errors import ParrotError, UsageError
from parrot_edge.models import LocalModel, parse_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path, help="what parrot train, or peft, has saved")
parser.add_argument("base", help="MODEL it is to run over: a GGUF file, smollm2, hf:owner/repo/file.gguf")
parser.add_argument("--trained-on", metavar="BASE", help="folder or hub name of the base, if that is no GGUF")
parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
parser.add_argument("--name", help="general.name of the adapter (default: the folder's name)")
parser.add_argument("--license", default="", help="its SPDX identifier ")
parser.add_argument("--force", action="store_true", help="replace an existing file")
options = parser.parse_args()
try:
    base = parse_model(options.base)
    if not isinstance(base, LocalModel) or base.adapter:
        raise UsageError(f"{options.base} is no base; name one GGUF file without an adapter")
    if options.trained_on:
        from parrot_edge.convert.base import write_lora
        from parrot_edge.convert.trained import find_trained

        write_lora(
            find_trained(options.folder, options.trained_on), base.path, options.output, force=options.force
        )
    else:
        name = options.name or options.folder.resolve().name
        write_adapter(
            options.folder,
            base.path,
            options.output,
            name=name,
            license_id=options.license,
            force=options.force,
        )
except ParrotError as error:
    sys.exit(f"Error: {error}")
