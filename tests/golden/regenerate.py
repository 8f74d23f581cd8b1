"""Record the golden losses anew: python -m tests.golden.regenerate

A change that should not change numbers leaves the record as it is; one that should says so, with
a new record in the same commit.
"""

import json

from tests.golden.debug_run import FILE, machine, run

if __name__ == "__main__":
    FILE.write_text(json.dumps(machine() | run(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
