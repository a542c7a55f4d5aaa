"""Everything that is measured on a GPU, one part after the other, each in a process of its own, each with its raw results.

    python -m benchmarks --config Llama-3.1-8B.json [--output results] [--parts techniques,decode]

Prints what each part prints; a part that fails is named at the end and costs only itself. The whole takes about an hour on an H200.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: part -> module and its arguments; ``CONFIG`` and ``OUTPUT`` (the folder) are filled in
PARTS = {
    "techniques": "gpu --cases decode-1,decode-8,decode-64,decode-256,prefill,long,score --config CONFIG --seconds 3000 --output OUTPUT/gpu.jsonl",
    "small": "gpu --cases small --output OUTPUT/gpu-small.jsonl",
    "decode": "decode --config CONFIG --batches 1,64 --kernels --output OUTPUT/decode.json",
    "ragged": "ragged --config CONFIG --output OUTPUT/ragged.json",
    "scoring": "scoring --config CONFIG --output OUTPUT/scoring.json",
    "offload": "placement offload --config CONFIG --output OUTPUT/offload.json",
    "parallel": "placement parallel --config CONFIG --output OUTPUT/parallel.json",
    "weights": "weight_kernels --output OUTPUT/weight_kernels.json",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="", help="a model's config.json; its weights are random")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the raw results")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    arguments = parser.parse_args()
    unknown = set(arguments.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no part named {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in arguments.parts.split(","):
        filled = [word.replace("CONFIG", arguments.config).replace("OUTPUT", str(arguments.output)) for word in PARTS[part].split()]
        print(f"== {part}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{filled[0]}", *filled[1:]]).returncode:
            failed.append(part)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
