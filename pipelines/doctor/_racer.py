"""One of several processes that write the same names at the same moment: `python -m pipelines.doctor._racer URL ROUNDS NUMBER`."""

import json
import sys
import time

from aecore.store import AlreadyExists, open_store


def main(url: str, rounds: int, number: int) -> None:
    """Say when the store is open, read the moment to start at, write, say which names were won."""
    store = open_store(url)
    store.list()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    start = float(sys.stdin.readline())
    won = []
    for name in range(rounds):
        time.sleep(max(0.0, start + name * 0.05 - time.time()))
        try:
            store.put(f"race-{name}", str(number).encode() * 1000, role="doctor")
            won.append(True)
        except AlreadyExists:
            won.append(False)
    sys.stdout.write(json.dumps(won) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
