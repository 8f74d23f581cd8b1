"""A rank that hears requests to stop as real ones do, and saves slowly: RUN_DIR SECONDS."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_gpt.errors import Stopped, run_main
from sparse_gpt.train.signals import StopRequests, code_of, listen, met


def main() -> None:
    listen()
    met()
    requests = StopRequests(Path(sys.argv[1]), None, first_rank=True)
    requests.begin(1)
    print("training", flush=True)
    while not any(requests.flags()):
        time.sleep(0.02)
    time.sleep(float(sys.argv[2]))
    code = code_of(requests.flags(), None)
    requests.end(code)
    print("saved", flush=True)
    raise Stopped("saved", code)


if __name__ == "__main__":
    run_main(main)
