#!/bin/sh
# Run the given command with the project's virtual environment first on PATH.
set -eu
export PATH="/sparse_gpt/.venv/bin:$PATH"
exec "$@"
