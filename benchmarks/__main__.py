"""Run the benchmarks: python -m benchmarks [NAME ...]; without a name, all of them."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = ("sparse_linear", "train_step", "n_m", "topology_update")


def main() -> int:
    names = sys.argv[1:] or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            print(
                f"error: no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr
            )
            return 2
    for name in names:
        script = Path(__file__).with_name(f"{name}.py")
        code = subprocess.run([sys.executable, str(script)], check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
