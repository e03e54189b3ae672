"""What a downstream team does: features through pyarrow alone, and the bytes that it costs.

Prints: rows, dimensions of all columns, bytes read for time-steps below 300, bytes read for all.
"""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

endpoint, folder = sys.argv[1], sys.argv[2]
s3 = fs.S3FileSystem(endpoint_override=endpoint, scheme="http")
manifest = json.loads(s3.open_input_file(f"{folder}/manifest.json").read())


class CountingFile:
    """A file that counts the bytes which are read from it."""

    def __init__(self, file):
        self.file, self.bytes_read, self.closed = file, 0, False

    def read(self, size=-1):
        data = self.file.read(size if size >= 0 else None)
        self.bytes_read += len(data)
        return data

    def seek(self, position, whence=0):
        return self.file.seek(position, whence)

    def tell(self):
        return self.file.tell()

    def size(self):
        return self.file.size()


def read(columns):
    """All rows of the given columns, and the bytes read for them, the footer apart."""
    tables, bytes_read = [], 0
    for part in manifest["parts"]:
        counting = CountingFile(s3.open_input_file(f"{folder}/{part}"))
        file = pq.ParquetFile(pa.PythonFile(counting, mode="r"), pre_buffer=False)
        footer = counting.bytes_read
        # No threads: Arrow's may outlive the Python object that they read from.
        tables.append(file.read(columns, use_threads=False))
        bytes_read += counting.bytes_read - footer
    return pa.concat_tables(tables), bytes_read


names = [column["name"] for column in manifest["columns"]]
whole, bytes_of_all = read(["key", *names])
below_300 = [c["name"] for c in manifest["columns"] if c["timesteps"][0] < 300]
_, bytes_below = read(["key", *below_300])
dims = sum(whole.schema.field(name).type.list_size for name in names)
assert not [module for module in sys.modules if module.split(".")[0] in ("torch", "pretrain")]
print(whole.num_rows, dims, bytes_below, bytes_of_all)
