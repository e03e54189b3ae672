"""Ray: the coordinator, training workers, export workers."""

import os

# Read by Ray when it is imported. Of a worker that died it prints a thousand characters to standard
# output; whoever started the work says it in a line.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "^(A worker died or was killed while executing|Task .* failed[.] There are .* retries)",
)
