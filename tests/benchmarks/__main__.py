"""`python -m tests.benchmarks [topic ...]`: run the `main()` of every `bench_<topic>.py` here, or of the topics named."""

import importlib
import sys
from pathlib import Path

from tests.benchmarks.pairs import machine


def main(topics: list[str]) -> int:
    """Run the topics in order of their names; an unknown one is refused with the known ones."""
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    unknown = [topic for topic in topics if topic not in known]
    if unknown:
        print(f"unknown: {', '.join(unknown)} (known: {', '.join(known) or 'none'})", file=sys.stderr)
        return 2
    print(machine(), flush=True)
    for topic in topics or known:
        print(f"\n## {topic}", flush=True)
        importlib.import_module(f"tests.benchmarks.bench_{topic}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
